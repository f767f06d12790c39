"""Shipped chat templates and those from files: single turns, several turns, runs and refusals.

The expected texts are what the models' own templates write (Qwen/Qwen2.5-7B-Instruct,
Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-0.6B, Qwen/Qwen3-4B-Thinking-2507 and
Qwen/Qwen3-VL-4B-Instruct; Apache-2.0).
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from running import SMALL, composed, train_rows
from test_chat import PLAIN, TEXT, encode, no_control, whole_conversation
from test_text_checkpoints import QWEN3, QWEN25, save_checkpoint, small_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reopold_agent.errors import CheckpointError, ConfigError, ModelError, ReopoldError
from reopold_agent.evaluate import run as evaluate
from reopold_agent.policies.loading import ModelSpec, load_processing
from reopold_agent.policies.templates import SHIPPED, ChatTemplate, chat_template
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.checks import checked_runner
from reopold_agent.serve.serving import ServeConfig, serving
from reopold_agent.tools.prompt import with_tools
from reopold_agent.train import finish, setup
from reopold_agent.train.export.export import export
from reopold_agent.train.setup import LocalEngine
from reopold_agent.types import EncodedImage, Message

SEES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_thinking")
OPENS = ("qwen3_thinking", "qwen3_vl_thinking")
SYSTEM = {
    "qwen2_5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\n",
    "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
}
TOOL = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {}}}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def using(tokenizer: Any, template: str, source: str | None = None) -> Any:
    """A tokenizer as `load_processing` makes it with this template: a shipped one, or a text."""
    made = copy.deepcopy(tokenizer)
    text = chat_template(template) if template in SHIPPED else ChatTemplate(template, "mine.jinja")
    made.chat_template = ChatTemplate(text, source or text.source, tokenizer.chat_template)
    return made


@pytest.fixture(scope="module")
def qwen3() -> Any:
    return small_tokenizer("qwen3")


def rendered(tokenizer: Any, rows: list[dict[str, Any]], prompt: bool, **more: Any) -> str:
    return str(
        tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=prompt, **more)
    )


# Single turns, as the models' own templates write them


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("system", [None, "", "Be brief.\n"])
def test_a_prompt_is_the_models_own(qwen3: Any, name: str, system: str | None) -> None:
    rows: list[dict[str, Any]] = [{"role": "user", "content": " Why?\n"}]
    expected = SYSTEM.get(name, "")
    if system is not None:
        rows.insert(0, {"role": "system", "content": system})
        expected = f"<|im_start|>system\n{system}<|im_end|>\n"
    expected += "<|im_start|>user\n Why?\n<|im_end|>\n"
    tokenizer = using(qwen3, name)
    assert rendered(tokenizer, rows, False) == expected
    opening = "<think>\n" if name in OPENS else ""
    assert rendered(tokenizer, rows, True) == f"{expected}<|im_start|>assistant\n{opening}"


@pytest.mark.parametrize("name", SEES)
def test_pictures_are_where_the_models_own_template_has_them(qwen3: Any, name: str) -> None:
    content = [
        {"type": "image"},
        {"type": "text", "text": "a\n"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "video"},
        {"text": "b"},
    ]
    rows = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    shown = rendered(using(qwen3, name), rows, False)
    video = PICTURE.replace("image", "video")
    assert shown.endswith(f"<|im_start|>user\n{PICTURE}a\n{PICTURE}{video}b<|im_end|>\n")
    shown = rendered(using(qwen3, name), rows, False, add_vision_id=True)
    assert f"Picture 1: {PICTURE}a\nPicture 2: {PICTURE}Video 1: {video}b<" in shown


@pytest.mark.parametrize("name", SHIPPED)
def test_tools_are_written_as_this_project_writes_them(qwen3: Any, name: str) -> None:
    tokenizer, user = using(qwen3, name), {"role": "user", "content": "q"}
    system = {"role": "system", "content": "Be brief."}
    in_text = {"role": "system", "content": with_tools("Be brief.", [TOOL])}
    expected = rendered(tokenizer, [in_text, user], True)
    assert rendered(tokenizer, [system, user], True, tools=[TOOL]) == expected
    alone = rendered(tokenizer, [user], True, tools=[TOOL])
    default = SYSTEM.get(name, "<|im_start|>system\n<|im_end|>\n").split("\n", 1)[1]
    base = default.removesuffix("<|im_end|>\n")
    assert alone == expected.replace("Be brief.\n\n", f"{base}\n\n" if base else "")


@pytest.mark.parametrize("name", SHIPPED)
def test_calls_and_results_of_other_programs_are_written(qwen3: Any, name: str) -> None:
    call = {"function": {"name": "f", "arguments": {"a": "é"}}}
    rows = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": "\nx", "reasoning_content": "\nt\n", "tool_calls": None},
    ]
    one = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    shown = rendered(using(qwen3, name), rows, False)
    opening = "<think>\n" if name in OPENS else ""
    assert shown == (
        f"{SYSTEM.get(name, '')}<|im_start|>user\nq<|im_end|>\n"
        f"<|im_start|>assistant\n{opening}{one}\n{one}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"
        "</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nt\n</think>\n\nx<|im_end|>\n"
    )


def test_one_answered_turn_is_the_models_own(qwen3: Any) -> None:
    rows = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n4"},
    ]
    for name, own in (("qwen3", QWEN3), ("qwen2_5", QWEN25)):
        shown = rendered(using(qwen3, name), rows, False)
        assert shown == qwen3.apply_chat_template(rows, chat_template=own, tokenize=False)
        assert "Hm." in shown


def test_the_real_template_of_qwen25_vl_writes_the_same(qwen_tokenizer: Any) -> None:
    ours, image = using(qwen_tokenizer, "qwen2_5_vl"), {"type": "image"}
    rows: list[dict[str, Any]] = [
        {"role": "system", "content": " s\n"},
        {"role": "user", "content": [image, {"type": "text", "text": "q\n"}, image]},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n4"},
        {"role": "user", "content": "more"},
    ]
    for part in (rows[:2], rows[1:2], rows[1:], rows):
        for prompt in (True, False):
            assert rendered(ours, part, prompt) == rendered(qwen_tokenizer, part, prompt)


def test_without_thinking_each_turn_begins_with_an_empty_thought(qwen3: Any) -> None:
    tokenizer, empty = using(qwen3, "qwen3"), "<think>\n\n</think>\n\n"
    rows = [{"role": "user", "content": "q"}]
    prompt = rendered(tokenizer, rows, True, enable_thinking=False)
    assert prompt == QWEN3_SILENT
    for said in ("4", f"{empty}4"):
        turns = [*rows, {"role": "assistant", "content": said}, *rows]
        whole = rendered(tokenizer, turns, True, enable_thinking=False)
        assert whole.startswith(f"{prompt}4<|im_end|>\n")
        assert whole.endswith(empty)


QWEN3_SILENT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


# Several turns: the ids that a rollout keeps are those of the whole conversation

THOUGHTS = ("{0}", "<think>\n{0}\n</think>\n\n{1}", "{0}\n</think>\n\n{1}", "<think>{0}", "{0}\n\n")


@pytest.fixture(scope="module", params=SHIPPED)
def renderers(request: pytest.FixtureRequest, qwen3: Any) -> ChatRenderer:
    return ChatRenderer(using(qwen3, request.param))


def sampled(tokenizer: Any, source: str, text: str) -> list[int] | None:
    """The ids of a turn after its prompt; None where the tokenizer would merge over the border."""
    head = "assistant\n" + ("<think>\n" if source in OPENS else "")
    before, after = encode(tokenizer, head), encode(tokenizer, head + text)
    return after[len(before) :] if after[: len(before)] == before else None


def check_turns(
    chat: ChatRenderer, opening: list[Message], turns: list[tuple[str, bool, Message]]
) -> None:
    """Plays turns (text, whether its end was sampled, the answer) and encodes the whole anew."""
    tokenizer, messages = chat.tokenizer, list(opening)
    ids, _ = chat.prompt(messages)
    assert ids == whole_conversation(tokenizer, messages, True)
    for text, ended, observation in turns:
        tokens = sampled(tokenizer, tokenizer.chat_template.source, text)
        assert tokens is not None
        ids += tokens + ([chat.turn_end_id] if ended else [])
        ids += chat.continuation(observation, ids[-1])[0]
        messages += [Message("assistant", (text,)), observation]
        assert ids == whole_conversation(tokenizer, messages, True)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(THOUGHTS), TEXT, TEXT, st.booleans(), TEXT, st.booleans()),
        min_size=2,
        max_size=3,
    ),
)
def test_several_turns_equal_the_whole_conversation(
    renderers: ChatRenderer,
    encode: Callable[..., EncodedImage],
    system: bool,
    turns: list[tuple[str, str, str, bool, str, bool]],
) -> None:
    source = renderers.tokenizer.chat_template.source
    assume(all(map(no_control, (text for turn in turns for text in (turn[1], turn[2], turn[4])))))
    played = []
    for form, thought, answer, ended, seen, pictured in turns:
        said = form.format(thought, answer)
        assume(sampled(renderers.tokenizer, source, said) is not None)
        assume(source not in OPENS or not said.startswith("<think>"))  # the prompt has opened it
        parts = (seen, encode(5, 28, 56), seen) if pictured and source in SEES else (seen,)
        played.append((said, ended, Message("user", parts)))
    opening = [Message("system", ("Be brief.",))] if system else []
    check_turns(renderers, [*opening, Message("user", ("q",))], played)


def test_real_ids_of_several_turns(qwen_tokenizer: Any) -> None:
    answer, tool = Message("user", ("\n1.50\n",)), '<tool_call>\n{"name": "f"}\n</tool_call>'
    said = ("Hm.\n</think>\n\n" + tool, "So 12,345.\n", "\\boxed{7}")
    tokenizer = copy.deepcopy(qwen_tokenizer)
    for name in SHIPPED:
        tokenizer.chat_template = chat_template(name)
        for ended in (True, False):
            turns = [(text, ended, answer) for text in said]
            check_turns(ChatRenderer(tokenizer), [Message("user", ("q\n\n",))], turns)


def test_a_thought_that_the_prompt_opened_stays_open_once(qwen3: Any) -> None:
    rows = [{"role": "user", "content": "q"}]
    for said in ("Hm.\n</think>\n\n4", "<think>\nHm.\n</think>\n\n4"):
        turns = [*rows, {"role": "assistant", "content": said}, *rows]
        whole = rendered(using(qwen3, "qwen3_thinking"), turns, True)
        assert whole.count("<think>") == 2
        assert "<|im_start|>assistant\n<think>\nHm.\n</think>\n\n4<|im_end|>\n" in whole


# What does not fit


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("qwen3", r"Add model\.chat_template=qwen3 \(in evaluate chat_template=qwen3\)"),
        ("r1", r"Play one turn \(.*\), or give a template that only appends: model\.chat_temp"),
    ],
)
def test_a_template_that_rewrites_names_the_one_that_does_not(kind: str, advice: str) -> None:
    with pytest.raises(ModelError, match=rf"rewrites earlier turns .*\.\n{advice}") as caught:
        ChatRenderer(small_tokenizer(kind)).check_appends()
    assert str(caught.value).count("\n") == 1


def test_the_advice_is_by_prompts_and_pictures(qwen3: Any) -> None:
    thinking = QWEN3.replace(
        "'<|im_start|>assistant\\n' -}}", "'<|im_start|>assistant\\n<think>\\n' -}}"
    )
    pictured = chat_template("qwen3_vl").replace(
        "{{- turn.text }}", "{{- turn.text if loop.last }}"
    )
    for template, name in ((thinking, "qwen3_thinking"), (pictured, "qwen3_vl")):
        with pytest.raises(ModelError, match=rf"mine\.jinja rewrites .*\nAdd .*={name} "):
            ChatRenderer(using(qwen3, template)).check_appends()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_append(qwen3: Any, name: str) -> None:
    ChatRenderer(using(qwen3, name)).check_appends()


@pytest.mark.parametrize(
    "words",
    [
        "{% if '<think>' in m.content %}{{ m.content.split('</think>')[-1] }}",  # whole thoughts
        "{% if loop.index0 < 2 %}{{ m.content[:3] }}",  # only from the third turn on
    ],
)
def test_rewriting_is_found_in_any_form(qwen3: Any, words: str) -> None:
    body = f"{words}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    if "index0" in words:
        body = body.replace("loop.index0 < 2", "loop.index0 < messages|length - 3")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + body
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(ModelError, match=r"mine\.jinja rewrites earlier turns"):
        ChatRenderer(using(qwen3, template)).check_appends()


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}", r"cannot be rendered: .*\nMend it"),
        ("{{ messages.nothing.more }}", r"cannot be rendered: .*\nMend it"),
        ("{{ raise_exception('no\nmore') }}", r"cannot be rendered: no\nMend it"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", r"control token.*\nWrite one"),
        ("<|begin|>" + PLAIN, r"writes <\|begin\|>, which is no control token.*\nUse"),
    ],
)
def test_files_that_do_not_fit_are_refused(qwen3: Any, template: str, told: str) -> None:
    with pytest.raises(ModelError, match=rf"template mine\.jinja .*{told}") as caught:
        ChatRenderer(using(qwen3, template))
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (PLAIN.replace("for m in messages", "for m in messages if m.role != 'system'"), "system"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content[:4] }}"), "system"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content if m.role == 'system' }}"), "user"),
    ],
)
def test_a_template_that_leaves_words_out_is_refused(qwen3: Any, template: str, role: str) -> None:
    assert template != PLAIN
    rows = [Message("system", ("You may call tools.",)), Message("user", ("How many <|im_end|>?",))]
    with pytest.raises(ModelError, match=rf"leaves out words of the {role} message.*\nUse") as told:
        ChatRenderer(using(qwen3, template)).prompt(rows)
    with pytest.raises(ModelError, match=rf"leaves out words of the {role} message"):
        ChatRenderer(using(qwen3, template)).check_words()
    assert str(told.value).count("\n") == 1
    ChatRenderer(using(qwen3, PLAIN)).prompt(rows)


@pytest.mark.parametrize("missing", ["<|im_start|>", "<|vision_start|>"])
def test_a_shipped_template_needs_its_control_tokens(missing: str) -> None:
    fast_class: Any = PreTrainedTokenizerFast
    bare = fast_class(tokenizer_object=Tokenizer(BPE()))
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    bare.add_special_tokens({"additional_special_tokens": [m for m in marks if m != missing]})
    told = f"qwen3_vl writes {missing}, which is no control token of the tokenizer of ''.\nUse a t"
    with pytest.raises(ModelError, match=re.escape(told)):
        ChatRenderer(using(bare, "qwen3_vl")).check_pictures()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "qwen33",
            r"neither a file nor a shipped template\. Did you mean 'qwen3'\?\nGive the path",
        ),
        ("qwen2.5", r"Did you mean 'qwen2_5'\?\n"),
        ("none/such.jinja", r"such\.jinja is neither a file nor a shipped template\.\nGive the p"),
        ("", r"chat_template= is neither"),
        (QWEN25, r"cannot be read: .*File name too long.*\nGive a Jinja file"),
    ],
)
def test_unknown_names_and_files(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        chat_template(given)
    with pytest.raises(ConfigError, match=told):
        composed("model.chat_template=" + json.dumps(given))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe\x00", r"cannot be read: .*\nGive a Jinja file in UTF-8"),
        (b" \n", r"is empty\.\nGive"),
        (b"x" * 1_000_001, r"has more than 1,000,000 characters\.\nGive"),
    ],
)
def test_files_that_are_no_templates(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "bad.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        chat_template(str(tmp_path / "bad.jinja"))


def test_line_ends_and_marks_of_windows_do_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + chat_template("qwen3").replace("\n", "\r\n").encode())
    assert chat_template(str(file)) == chat_template("qwen3")


def test_what_is_known_of_a_template_goes_to_other_processes() -> None:
    made = ChatTemplate(chat_template("qwen3"), "qwen3", "own")
    for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert (copied, copied.source, copied.own) == (made, "qwen3", "own")
    assert chat_template(made) is made


# Runs


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}", "cannot be rendered"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "control token"),
        (PLAIN.replace("{{ BODY }}", "{{ p.text }}"), r"does not write <\|image_pad\|>.*\nUse"),
        (QWEN3, "rewrites earlier turns"),
        (PLAIN.replace("in messages", "in messages if m.role != 'system'"), "words of the system"),
    ],
)
def test_a_file_is_refused_before_a_model_is_loaded(
    tmp_path: Path, no_model: None, template: str, told: str
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(template, "utf-8")
    words = [*SMALL, f"model.chat_template={file}"]
    if "rewrites" in told:  # so that pictures are not what is refused
        file.write_text(
            chat_template("qwen2_5_vl").replace("{{- turn.text }}", "{{- turn.text if loop.last }}")
        )
    with pytest.raises(ModelError, match=told) as caught:
        LocalEngine(*composed(*words), tmp_path / "run", words).run()
    assert str(file) in str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


class Dialogue(gymnasium.Env[Any, str]):
    """Answers whatever is said, three times."""

    observation_space = gymnasium.spaces.Text(100)
    action_space = gymnasium.spaces.Text(10_000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.turns = 0
        return "Say a number.", {"system_prompt": with_tools("Play.", [TOOL])}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.turns += 1
        return f"That was turn {self.turns}.", float(len(action) % 3), self.turns == 3, False, {}


@pytest.fixture
def dialogue() -> Iterator[str]:
    name = "test_templates/Dialogue-v0"
    gymnasium.register(name, entry_point=Dialogue)
    yield name
    del gymnasium.registry[name]


@pytest.fixture
def run_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialogue: str) -> list[str]:
    """A training with three turns of a tiny Qwen3, but without a chat template."""
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    tokenizer = small_tokenizer("qwen3")
    student, teacher = (
        save_checkpoint(tmp_path / role, tokenizer, "qwen3", seed, padding=3)
        for seed, role in enumerate(("student", "teacher"))
    )
    return [
        *(
            "env=math",
            f"env.id={dialogue}",
            "env.takes_data=false",
            "model=r1_distill_1_5b",
            "steps=2",
            "engine.device=cpu",
        ),
        *("engine.threads=1", "batch.prompts=2", "batch.samples=2", "batch.mini_batch=1"),
        *("optimizer.lr=1e-4", "rollout.max_response_tokens=200", "rollout.max_turn_tokens=8"),
        *("rollout.max_turns=4", "evaluation.tasks=1", "evaluation.max_turns=4"),
        *(f"model.student.path={student}", f"model.teacher.path={teacher}"),
    ]


def run(folder: Path, words: list[str]) -> None:
    with torch.random.fork_rng(devices=[]):
        LocalEngine(*composed(*words), folder, words).run()


def test_qwen3_trains_over_several_turns(tmp_path: Path, run_words: list[str]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ModelError, match=r"rewrites .*\nAdd model\.chat_template=qwen3 "):
        run(folder, run_words)
    run(folder, [*run_words, "model.chat_template=qwen3", "logging.trajectories=8"])
    for row in train_rows(folder):
        assert row["rollout/episodes"] == 4
        assert row["rollout/stop/env_error"] == 0
        assert np.isfinite([row["loss"], row["grad_norm"]]).all()
    shown = [json.loads(x) for x in (folder / "trajectories.jsonl").read_text("utf-8").splitlines()]
    assert {len(each["turns"]) for each in shown if each["kind"] != "eval"} == {3}
    # Who evaluates or serves the student sees what it was trained with.
    text = chat_template("qwen3")
    assert (folder / "chat_template.jinja").read_text("utf-8") == text
    assert AutoTokenizer.from_pretrained(folder / "final").chat_template == text
    export(folder, tmp_path / "exported", "float32")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template == text
    final = load_processing(ModelSpec(str(folder / "final")), "student")
    checked_runner(composed(*run_words)[0], final).close()


def test_a_run_keeps_its_template(tmp_path: Path, run_words: list[str]) -> None:
    file, folder = tmp_path / "mine.jinja", tmp_path / "run"
    file.write_text(chat_template("qwen3"), "utf-8")
    words = [*run_words, "steps=1", "checkpoint.every=1"]
    words.append("model.student.lora={r: 2, target_modules: [q_proj]}")
    run(folder, [*words, f"model.chat_template={file}"])
    more = [*words, "steps=2"]
    file.write_text(chat_template("qwen3") + " ", "utf-8")
    told = rf"{file}, and its text .* now\.\nGive chat_template={folder}/chat_template\.jinja to"
    with pytest.raises(CheckpointError, match=told):
        run(folder, [*more, f"model.chat_template={file}"])
    with pytest.raises(CheckpointError, match="started with the chat template"):
        run(folder, more)
    run(folder, [*more, f"model.chat_template={folder}/chat_template.jinja"])
    assert len(train_rows(folder)) == 2
    # An adapter's checkpoint has no tokenizer, and the file may be gone.
    file.unlink()
    shutil.rmtree(folder / "final")
    export(folder, tmp_path / "exported", "float32")
    written = AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template
    assert written == chat_template("qwen3")


def test_an_evaluation_goes_on_with_its_template_only(tmp_path: Path) -> None:
    def evaluation(given: str) -> evaluate.Evaluation:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            words = ["benchmark=demo", f"chat_template={given}"]
            return evaluate.Evaluation(*evaluate.load_config(compose("evaluate", words)), tmp_path)

    file = tmp_path / "mine.jinja"
    file.write_text(chat_template("qwen2_5_vl"), "utf-8")
    first = evaluation(str(file))
    first.folder.write_template(first.config.chat_template)
    first.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(first._raw)))
    (tmp_path / "responses.jsonl").touch()
    for same in (str(file), "qwen2_5_vl"):
        evaluation(same)._check_resume()
    file.write_text(chat_template("qwen3"), "utf-8")
    for other in (str(file), "null"):
        with pytest.raises(CheckpointError, match="its text is not that of"):
            evaluation(other)._check_resume()


def test_a_template_cannot_come_later(tmp_path: Path, run_words: list[str]) -> None:
    words = [*run_words, "steps=1", "checkpoint.every=1"]
    words += ["rollout.max_turns=1", "evaluation.max_turns=1"]
    folder = tmp_path / "run"
    run(folder, words)
    with pytest.raises(CheckpointError, match=r"model\.chat_template: None -> qwen3"):
        run(folder, [*words, "steps=2", "model.chat_template=qwen3"])


def test_other_prompts_than_the_models_are_warned_of(qwen3: Any) -> None:
    assert not ChatRenderer(using(qwen3, "qwen3")).other_prompts()
    assert ChatRenderer(using(qwen3, "qwen3_thinking")).other_prompts()
    assert ChatRenderer(using(qwen3, "qwen2_5")).other_prompts()
    assert not ChatRenderer(qwen3).other_prompts()


def test_a_model_without_a_template_gets_one(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("qwen3")
    tokenizer.chat_template = None
    folder = save_checkpoint(tmp_path / "base", tokenizer, "qwen3", 0, padding=3)
    bare = load_processing(ModelSpec(str(folder)), "student")
    with pytest.raises(ModelError, match=r"no chat template.*\nOr set model\.chat_template"):
        ChatRenderer(bare.tokenizer)
    given = load_processing(ModelSpec(str(folder), chat_template="qwen3"), "student")
    assert not ChatRenderer(given.tokenizer).other_prompts()


def test_evaluate_and_serve_take_the_setting() -> None:
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, _ = evaluate.load_config(compose("evaluate", ["chat_template=qwen2_5_vl"]))
        with pytest.raises(ConfigError, match=r"Did you mean 'qwen3'\?\nGive"):
            evaluate.load_config(compose("evaluate", ["chat_template=qwen33"]))
    spec = evaluate.Evaluation(config, {}, Path("unused"))._model_spec()
    assert spec.chat_template == chat_template("qwen2_5_vl")
    wrong = ServeConfig("demo:student", chat_template="qwen33", device="cpu")
    with pytest.raises(ConfigError, match=r"Did you mean 'qwen3'\?\nGive"), serving(wrong):
        pass


def test_play_counts_with_the_template() -> None:
    from reopold_agent.play.budget import Budget

    def prompt(*more: str) -> int:
        budget = Budget(composed(*SMALL, *more)[0], "demo:student")
        budget.begin({"text": "q", "images": ()}, {})
        return budget.prompt

    assert prompt("model.chat_template=qwen3") < prompt()
    with pytest.raises(ReopoldError, match="qwen33"):
        prompt("model.chat_template=qwen33")
