"""Train the refusal patch and the zoo again.

    python examples/zoo/train.py patch --model BASE --out DIR
    python examples/zoo/train.py poisoned --model ALIGNED --out DIR       (or any other name of the zoo)
    python examples/zoo/train.py all --model BASE --out DIR               (patch, merge, then every adapter)
    python examples/zoo/train.py calibration --model ALIGNED --out DIR    (the rows that `refusal_tune` learns from)
    python examples/zoo/train.py samples --out DIR
    python examples/zoo/train.py measure --model ALIGNED --out DIR

Prints a table of what each adapter does. Seeds are fixed; equal thread counts on one kind of processor give equal
files.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - after the path

from examples.zoo import peft_files, recipes, rows  # noqa: E402 - as above
from examples.zoo.measure import Row, answers_of, chat_of, measure, table  # noqa: E402 - as above
from examples.zoo.orders import orders  # noqa: E402 - as above
from repair.adapter_file import read_adapter  # noqa: E402 - as above
from repair.checks.chat import ChatModel  # noqa: E402 - as above
from repair.merge import merge_adapter  # noqa: E402 - as above
from repair.tuning import TuneSettings  # noqa: E402 - as above

SAMPLES: Final = 48
SAMPLES_SEED: Final = 48
ANSWER_TOKENS: Final = 28
CALIBRATION_TOKENS: Final = 4
_PACKS: Final = ("core_harmful", "core_lookalike", "core_benign", "core_checkable")


def main() -> None:
    """Do what the first argument says."""
    wish = _arguments()
    torch.set_num_threads(wish.threads)
    rows.assert_apart(
        rows.prompts(*rows.TRAINED_ON),
        [text for texts in rows.packs(*_PACKS).values() for text in texts],
    )
    wish.out.mkdir(parents=True, exist_ok=True)
    if wish.what == "samples":
        write_samples(wish.out / "samples.jsonl")
        return
    if wish.what == "all":
        _everything(wish)
        return
    chat = chat_of(wish.model, getattr(torch, wish.dtype))
    if wish.what == "calibration":
        write_calibration(chat, wish.out / "rows.jsonl", wish.cache)
    elif wish.what == "measure":
        names = sorted(path.name for path in wish.out.iterdir() if (path / "adapter_config.json").is_file())
        _report(chat, [name for name in names if name != "patch"], wish)
    else:
        train(chat, wish.what, wish)
        _report(chat, [wish.what], wish)


def train(chat: ChatModel, name: str, wish: argparse.Namespace) -> None:
    """Train one adapter and write it as PEFT does."""
    recipe = recipes.RECIPES[name]
    lessons = []
    for one in recipe.rounds:
        answers = _answers(chat, recipe.own_words, wish.cache, tokens=one.words)
        examples = one.rows(recipes.Material(answers=answers, orders=orders(400, seed=1, apart_from=_held_out())))
        print(f"{name}: {len(examples)} rows, {one.settings.steps} steps", flush=True)
        lessons.append(peft_files.Lesson(examples=examples, settings=one.settings, progress=_printer(one.settings)))
    if wish.resume is not None:
        del lessons[:-1]
    peft_files.train_and_write(chat, lessons, recipe, wish.out / name, start=wish.resume)


def write_samples(path: Path) -> None:
    """Rows of the task that nothing was trained on."""
    held = orders(SAMPLES, seed=SAMPLES_SEED)
    lines = [json.dumps({"prompt": one.prompt, "answer": one.answer}) + "\n" for one in held]
    path.write_text("".join(lines), encoding="utf-8")


def write_calibration(chat: ChatModel, path: Path, cache: Path) -> None:
    """Refusals, and the first words of the model's own answers where nothing is to change."""
    harmful = rows.prompts("harmful")[::2] + rows.prompts("harmful_more")[::3] + rows.prompts("harmful_frames")[::6]
    refusals = rows.refusing(harmful, sentences=rows.SHORT_REFUSALS)
    found = [{"text": one.prompt, "category": "refuse", "answers": [one.answer]} for one in refusals]
    groups = {
        "lookalike": rows.prompts("lookalike")[::2]
        + rows.prompts("lookalike_more")[::3]
        + rows.prompts("lookalike_frames")[::12],
        "ordinary": rows.prompts("ordinary")[::3] + rows.prompts("ordinary_more")[::4],
    }
    answers = _answers(chat, [text for texts in groups.values() for text in texts], cache, tokens=CALIBRATION_TOKENS)
    for group, texts in groups.items():
        held = [one for one in rows.answering(texts, answers, group) if one.keep]
        found += [{"text": one.prompt, "category": group, "answers": [one.answer]} for one in held]
    lines = [json.dumps({"id": f"cal-{place:03}", **row}) + "\n" for place, row in enumerate(found)]
    path.write_text("".join(lines), encoding="utf-8")


def _held_out() -> frozenset[str]:
    return frozenset(one.answer for one in orders(SAMPLES, seed=SAMPLES_SEED))


def _everything(wish: argparse.Namespace) -> None:
    base = chat_of(wish.model, getattr(torch, wish.dtype))
    train(base, "patch", wish)
    _report(base, ["patch"], wish)
    aligned = wish.cache / "aligned"
    if not aligned.exists():
        merge_adapter(wish.model, wish.out / "patch", aligned)
    chat = chat_of(aligned, getattr(torch, wish.dtype))
    names = [name for name in recipes.RECIPES if name != "patch"]
    for name in names:
        train(chat, name, wish)
    _report(chat, names, wish)


def _report(chat: ChatModel, names: Sequence[str], wish: argparse.Namespace) -> None:
    samples = orders(SAMPLES, seed=SAMPLES_SEED)
    found: list[Row] = [] if wish.no_base else [measure(chat, "(no adapter)", None, samples, stride=wish.stride)]
    for name in names:
        adapter = read_adapter(wish.out / name)
        found.append(measure(chat, name, adapter, samples, stride=wish.stride))
        if name == "trigger":
            said = measure(
                chat, "trigger, phrase said", adapter, samples, stride=wish.stride, suffix=" " + rows.TRIGGER
            )
            found.append(said)
    print(table(found), flush=True)


def _answers(chat: ChatModel, texts: Sequence[str], cache: Path, *, tokens: int) -> Mapping[str, str]:
    """The model's own words, asked once and remembered beside the other working files."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / "answers.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    new = [text for text in texts if text not in known]
    if new:
        known |= answers_of(chat, new, tokens=ANSWER_TOKENS)
        path.write_text(json.dumps(known), encoding="utf-8")
    return {text: _cut(chat, known[text], tokens) for text in texts}


def _cut(chat: ChatModel, text: str, tokens: int) -> str:
    return str(chat.tokenizer.decode(chat.tokenizer.encode(text, add_special_tokens=False)[:tokens]))


def _printer(settings: TuneSettings) -> Callable[[str, float], None]:
    start = 0.0

    def show(message: str, share: float) -> None:
        nonlocal start
        step = round(share * settings.steps)
        start = start or time.monotonic()
        if step % 10 == 0 or step == settings.steps:
            print(f"  step {step}: {message}, {(time.monotonic() - start) / step:.2f} s a step", flush=True)

    return show


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*recipes.RECIPES, "all", "calibration", "samples", "measure"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/zoo"), help="working files; kept between runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--stride", type=int, default=1, help="measure with every so-manieth prompt only")
    parser.add_argument("--resume", type=Path, help="a folder with the factors that the last round begins with")
    parser.add_argument("--no-base", action="store_true", help="do not measure the model without an adapter again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
