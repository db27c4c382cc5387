// Shows a text: paragraphs, blocks of code, and code and bold words within lines. Everything a model wrote goes
// into the page as text, never as markup.

const FENCE = /^ {0,3}(```+|~~~+)\s*([^\s`]*)[^`]*$/;
const WITHIN = /(`[^`\n]+`|\*\*[^*\s](?:[^*\n]*[^*\s])?\*\*)/;

/** Puts a text into an element, in place of what was there. */
export function show(element, text) {
  const parts = split(text).filter((part) => part.code !== undefined || part.text.trim());
  const made = parts.map((part) =>
    part.code === undefined ? paragraph(part.text) : block(part.code, part.language));
  // Parts that did not change stay, so that a selection in them does too.
  made.forEach((node, index) => {
    const old = element.childNodes[index];
    if (!old) element.append(node);
    else if (!old.isEqualNode(node)) old.replaceWith(node);
  });
  while (element.childNodes.length > made.length) element.lastChild.remove();
}

/** Cuts a text into {text} and {code, language}; a fence that is not closed yet is code, too. */
function split(text) {
  const parts = [];
  let open = null;
  let lines = [];
  const close = () => {
    const body = lines.join("\n");
    if (open) parts.push({ code: body, language: open.language });
    else parts.push(...body.split(/\n{2,}/).map((piece) => ({ text: piece })));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const fence = FENCE.exec(line);
    if (!open && fence) {
      close();
      open = { mark: fence[1], language: fence[2] };
    } else if (open && line.trim().startsWith(open.mark) && !line.trim().slice(open.mark.length)) {
      close();
      open = null;
    } else {
      lines.push(line);
    }
  }
  close();
  return parts;
}

function paragraph(text) {
  const made = document.createElement("p");
  text.replace(/^\n+|\s+$/g, "").split(WITHIN).forEach((piece) => {
    if (/^`[^`]+`$/.test(piece)) made.append(element("code", "", piece.slice(1, -1)));
    else if (/^\*\*[^*]+\*\*$/.test(piece)) made.append(element("strong", "", piece.slice(2, -2)));
    else if (piece) made.append(piece);
  });
  return made;
}

function block(code, language) {
  const made = element("div", "code");
  const head = element("div", "head");
  const copy = element("button", "quiet copy", "Copy");
  copy.type = "button";
  head.append(element("span", "", language || "code"), copy);
  const body = element("pre");
  body.append(element("code", "", code));
  made.append(head, body);
  return made;
}

/** A new element with a class and a text. */
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
