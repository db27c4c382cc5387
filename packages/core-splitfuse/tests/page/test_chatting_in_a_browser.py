"""The chat page in a real browser, in front of the real server: type, stream, stop, go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ENTER, SHIFT, NOTHING, ESCAPE = "\ue007", "\ue008", "\ue000", "\ue00c"
CODE = """Call `even(3)` like **this**:

```python
def even(n):
    return n % 2 == 0  # <b>text</b> & more
```

Done. <img src=x onerror="document.title='run'">"""


def test_an_answer_streams_and_the_second_turn_knows_the_first(page: Any) -> None:
    page.engine.texts = ["the quick brown fox jumps over the dog", "it sleeps"]
    page.engine.pause = 0.05
    page.say("What does the fox do?")
    growing = {page.wait(lambda: page.at(".assistant .body").text)}
    page.wait(lambda: growing.add(page.at(".assistant .body").text) or len(growing) > 3)
    assert page.at("#stop").is_displayed()
    assert page.answered(1) == "the quick brown fox jumps over the dog"
    assert page.hidden("#stop")
    page.say("And then?")
    assert page.answered(2) == "it sleeps"
    assert page.engine.prompts[1] == (
        "[user]What does the fox do?\n[assistant]the quick brown fox jumps over the dog\n"
        "[user]And then?\n[assistant]"
    )
    facts = page.all(".facts")[0].text
    assert "first token" in facts
    assert "tokens/s" in facts


def test_stopping_keeps_what_was_written_and_frees_the_engine(page: Any) -> None:
    page.engine.texts = ["word " * 300, "word " * 300, "on"]
    page.engine.pause = 0.02
    page.say("Write")
    page.wait(lambda: "word word" in page.at(".assistant .body").text)
    page.at("#stop").click()
    first = page.answered(1)
    assert first.startswith("word word")
    assert len(first) < 1000
    assert "stopped" in page.at(".facts").text
    page.wait(lambda: not page.engine.busy)
    page.say("Again")
    page.wait(lambda: len(page.all(".assistant")) == 2 and "word" in page.all(".assistant")[1].text)
    page.type(ESCAPE)
    page.answered(2)
    page.wait(lambda: not page.engine.busy)
    page.say("Go on")
    assert page.answered(3) == "on"
    assert first in page.engine.prompts[2]


def test_keys_make_lines_and_send(page: Any) -> None:
    page.engine.texts = ["fine"]
    page.type("one", SHIFT, ENTER, NOTHING)
    page.say("two")
    page.answered(1)
    assert page.engine.prompts == ["[user]one\ntwo\n[assistant]"]
    assert page.at(".message.user .body").text == "one\ntwo"
    page.type("   ", ENTER)
    assert len(page.all(".message")) == 2


def test_what_a_model_writes_is_text_and_code_is_a_block(page: Any) -> None:
    page.engine.texts = [CODE]
    page.say("<i>Code</i>, please")
    page.answered(1)
    assert page.at(".user .body").text == "<i>Code</i>, please"
    assert page.at(".code pre").text == CODE.split("```")[1].removeprefix("python\n").rstrip()
    assert page.at(".code .head").text.startswith("python")
    assert [found.text for found in page.all(".assistant p code, .assistant strong")] == [
        "even(3)",
        "this",
    ]
    assert page.all(".message img, .message b, .message i") == []
    assert page.browser.title == "Chat · tiny-writer"


def test_settings_reach_the_server(page: Any) -> None:
    page.at("#open-settings").click()
    page.at("#system").send_keys("Be brief.")
    page.at("#max-tokens").clear()
    page.at("#max-tokens").send_keys("3")
    page.at("#close-settings").click()
    page.engine.texts = ["the quick brown fox jumps over the lazy dog"]
    page.say("Hello")
    page.answered(1)
    assert page.engine.prompts == ["[system]Be brief.\n[user]Hello\n[assistant]"]
    facts = page.at(".facts").text
    assert "3 tokens" in facts
    assert "cut at the longest answer" in facts


def test_a_new_chat_begins_anew_even_while_an_answer_is_written(page: Any) -> None:
    page.engine.texts = ["word " * 300, "fresh"]
    page.engine.pause = 0.02
    page.say("Write")
    page.wait(lambda: page.at(".assistant .body").text)
    page.at("#new").click()
    page.wait(lambda: page.hidden("#stop"))
    assert page.all(".message") == []
    page.say("Hello")
    assert page.answered(1) == "fresh"
    assert page.engine.prompts[1] == "[user]Hello\n[assistant]"


def test_a_refusal_is_told_and_can_be_tried_again(page: Any) -> None:
    page.at("#open-settings").click()
    page.at("#max-tokens").clear()
    page.at("#max-tokens").send_keys("99999")
    page.at("#close-settings").click()
    page.say("Hello")
    page.wait(lambda: "2048" in page.at("#notice").text)
    assert page.all(".message.assistant") == []
    page.at("#open-settings").click()
    page.at("#max-tokens").clear()
    page.at("#max-tokens").send_keys("8")
    page.at("#close-settings").click()
    page.engine.texts = ["yes"]
    page.at("#retry").click()
    assert page.answered(1) == "yes"
    assert page.hidden("#notice")


def test_a_question_that_was_refused_is_not_asked_with_the_next(page: Any) -> None:
    longest = "document.getElementById('max-tokens').value = arguments[0]"
    page.browser.execute_script(longest, 99999)
    page.say("long")
    page.wait(lambda: not page.hidden("#notice"))
    page.browser.execute_script(longest, 8)
    page.engine.texts = ["yes"]
    page.say("short")
    page.answered(1)
    assert page.engine.prompts == ["[user]short\n[assistant]"]


def test_thoughts_are_shown_apart_and_not_told_again(open_page: Callable[..., Any]) -> None:
    fields = {"reasoning_content": {"open": "<think>", "close": "</think>"}, "content": {}}
    page = open_page(response_template={"start_anchor": "[assistant]", "fields": fields})
    page.engine.texts = ["<think>the fox?</think>Yes", "Good"]
    page.say("Quick?")
    assert page.answered(1) == "Yes"
    page.at(".thoughts summary").click()
    assert page.at(".thoughts p").text == "the fox?"
    page.say("Sure?")
    assert page.answered(2) == "Good"
    assert "the fox?" not in page.engine.prompts[1]


def test_a_key_is_asked_for(open_page: Callable[..., Any]) -> None:
    page = open_page(api_key="secret")
    page.wait(lambda: page.at("#asked-key").is_displayed())
    page.at("#asked-key").send_keys("wrong", ENTER)
    page.wait(lambda: page.at("#asked-key").is_displayed())
    assert page.at("#asked-key").get_property("value") == ""
    page.at("#asked-key").send_keys("secret", ENTER)
    page.wait(lambda: page.at("#model").text == "tiny-writer")
    page.engine.texts = ["welcome"]
    page.say("Hello")
    assert page.answered(1) == "welcome"


def test_it_fits_wide_and_narrow_and_dark(page: Any, tmp_path: Path) -> None:
    page.engine.texts = [CODE, "word " * 60]
    page.say("Code, please")
    page.answered(1)
    page.say("More")
    page.answered(2)
    for width, scheme in [(1100, "light"), (1100, "dark"), (360, "light")]:
        size = {"width": width, "height": 760, "deviceScaleFactor": 1, "mobile": width < 500}
        page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        overflow = "return document.documentElement.scrollWidth - window.innerWidth"
        assert page.browser.execute_script(overflow) <= 0
        paper = page.browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
        assert (int(paper.split("(")[1].split(",")[0]) < 128) == (scheme == "dark")
        page.picture(tmp_path / f"{width}-{scheme}.png")
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    serious = [line for line in page.browser.get_log("browser") if line["level"] == "SEVERE"]
    assert serious == []
