// The chat: a conversation in memory, one answer at a time.

import { answer, ApiError, models } from "./api.js";
import { element, show } from "./text.js";

const at = (id) => document.getElementById(id);
let conversation = []; // {role, content}
let model = "";
let writing = null; // AbortController of the answer that is being written

// --- Messages ---

function addMessage(role, content) {
  at("empty").hidden = true;
  const item = element("li", `message ${role}`);
  item.append(element("div", "who", role === "user" ? "You" : model), element("div", "body"));
  show(item.querySelector(".body"), content);
  at("messages").append(item);
  return item;
}

function showFacts(item, facts) {
  item.querySelector(".facts")?.remove();
  const line = element("div", "facts");
  for (const [text, kind] of facts) line.append(element("span", kind ?? "", text));
  item.append(line);
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** What is told below an answer: time to first token, tokens, tokens per second, how it ended. */
function facts(clock) {
  const told = [];
  if (clock.first) told.push([`first token ${seconds(clock.first - clock.start)}`]);
  const tokens = clock.usage?.completion_tokens;
  if (tokens) told.push([`${tokens} ${tokens === 1 ? "token" : "tokens"}`]);
  const count = tokens ?? clock.pieces;
  const time = clock.end - clock.first;
  if (count > 1 && time > 0) {
    const rate = ((count - 1) / time) * 1000;
    told.push([`${tokens ? "" : "about "}${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`]);
  }
  if (clock.finish === "length") told.push(["cut at the longest answer", "warn"]);
  if (clock.finish === "stopped") told.push(["stopped"]);
  if (clock.finish === "error") told.push(["failed", "warn"]);
  return told;
}

// --- One turn ---

function request() {
  const system = at("system").value.trim();
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    temperature: Number(at("temperature").value),
    max_tokens: Math.max(1, Math.round(Number(at("max-tokens").value) || 512)),
  };
}

async function say(text) {
  // A question that was refused would spoil all that follows, and roles have to take turns.
  if (conversation.at(-1)?.role === "user") {
    conversation.pop();
    at("messages").lastElementChild.classList.add("refused");
  }
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  await reply();
}

/** Shows what a model thinks before it answers; it is no part of the conversation. */
function think(item, thought) {
  if (!item.querySelector(".thoughts")) {
    const made = element("details", "thoughts");
    made.append(element("summary", "", "Thoughts"), element("p"));
    item.querySelector(".body").before(made);
  }
  item.querySelector(".thoughts p").append(thought);
}

/** Asks for the answer to the conversation as it is. */
async function reply() {
  hideNotice();
  const turns = conversation;
  const item = addMessage("assistant", "");
  const body = item.querySelector(".body");
  const clock = { start: performance.now(), first: 0, end: 0, pieces: 0, finish: "stop" };
  let text = "";
  setWriting(new AbortController());
  item.classList.add("waiting");
  scroll(true);
  try {
    for await (const part of answer(request(), at("key").value, writing.signal)) {
      if (part.text || part.thought) {
        clock.first ||= performance.now();
        clock.end = performance.now();
        clock.pieces += 1;
        if (part.thought) think(item, part.thought);
        text += part.text ?? "";
        item.classList.replace("waiting", "writing");
        paint(() => show(body, text));
      }
      clock.finish = part.finish ?? clock.finish;
      clock.usage = part.usage ?? clock.usage;
    }
  } catch (error) {
    clock.finish = error.name === "AbortError" ? "stopped" : "error";
    if (clock.finish === "error") complain(error);
  }
  setWriting(null);
  if (turns !== conversation) return; // A new chat was begun meanwhile.
  paint.flush(() => show(body, text));
  item.classList.remove("waiting", "writing");
  if (!text && clock.finish === "error") {
    item.remove(); // The question stays, and can be asked again.
    return;
  }
  turns.push({ role: "assistant", content: text });
  item.classList.toggle("failed", clock.finish === "error");
  if (!text) body.append(element("p", "hint", "(no text)"));
  showFacts(item, facts(clock));
  scroll();
  if (matchMedia("(hover: hover)").matches) at("input").focus();
}

/** Runs the newest job once before the next picture, however many pieces come until then. */
function paint(job) {
  paint.job = job;
  paint.asked ??= requestAnimationFrame(() => paint.flush(paint.job));
}
paint.flush = (job) => {
  cancelAnimationFrame(paint.asked);
  paint.asked = undefined;
  const follow = atEnd();
  job?.();
  if (follow) scroll(true);
};

const page = document.querySelector("main");
const atEnd = () => page.scrollHeight - page.scrollTop - page.clientHeight < 60;

function scroll(always = false) {
  if (always || atEnd()) page.scrollTop = page.scrollHeight;
}

function setWriting(controller) {
  writing = controller;
  at("send").hidden = Boolean(controller);
  at("stop").hidden = !controller;
  at("messages").setAttribute("aria-busy", String(Boolean(controller)));
  refreshSend();
}

const stop = () => writing?.abort();

// --- Errors ---

function complain(error) {
  const keyWanted = error instanceof ApiError && error.status === 401;
  at("notice-text").textContent = keyWanted
    ? "This server asks for an API key." : error.message || String(error);
  at("key-form").hidden = !keyWanted;
  at("retry").hidden = keyWanted;
  at("notice").hidden = false;
  if (keyWanted) at("asked-key").focus();
}

function hideNotice() {
  at("notice").hidden = true;
}

/** Connects again where that failed, and answers what was not answered, or halfway only. */
async function again() {
  hideNotice();
  if (!model && !(await connect())) return;
  if (at("messages").lastElementChild?.classList.contains("failed")) {
    at("messages").lastElementChild.remove();
    conversation.pop();
  }
  if (conversation.at(-1)?.role === "user") await reply();
}

async function connect() {
  try {
    [model = ""] = await models(at("key").value);
  } catch (error) {
    at("model").textContent = "not connected";
    complain(error);
    return false;
  }
  at("model").textContent = model;
  document.title = `Chat · ${model}`;
  refreshSend();
  return true;
}

// --- Controls ---

function refreshSend() {
  at("send").disabled = Boolean(writing) || !model || !at("input").value.trim();
}

function fit() {
  const input = at("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  refreshSend();
}

function submit() {
  const text = at("input").value.trim();
  if (!text || writing || !model) return;
  at("input").value = "";
  fit();
  say(text);
}

function setDrawer(open) {
  at("settings").hidden = !open;
  at("open-settings").setAttribute("aria-expanded", String(open));
  at(open ? "system" : "input").focus();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
at("input").addEventListener("input", fit);
at("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!at("settings").hidden) setDrawer(false);
  else stop();
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", () => {
  stop();
  conversation = [];
  at("messages").replaceChildren();
  at("empty").hidden = false;
  hideNotice();
  at("input").focus();
});
at("open-settings").addEventListener("click", () => setDrawer(at("settings").hidden));
at("close-settings").addEventListener("click", () => setDrawer(false));
at("temperature").addEventListener("input", () => {
  at("temperature-value").textContent = at("temperature").value;
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  at("key").value = at("asked-key").value;
  at("asked-key").value = "";
  again();
});
at("retry").addEventListener("click", again);
at("dismiss").addEventListener("click", hideNotice);
at("messages").addEventListener("click", async (event) => {
  const button = event.target.closest(".copy");
  if (!button) return;
  const code = button.closest(".code").querySelector("pre");
  if (!navigator.clipboard) { // There is none on pages that came without TLS from elsewhere.
    getSelection().selectAllChildren(code);
    return;
  }
  await navigator.clipboard.writeText(code.textContent);
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});

connect();
