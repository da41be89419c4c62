from __future__ import annotations

from pathlib import Path

import pytest

from longalign_ray.cli import main
from longalign_ray.config import DataConfig
from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.make_plan import PlanSettings, make_plan
from longalign_ray.data.template import load_tokenizer
from longalign_ray.data.tokenize import ConversationTokenizer
from longalign_ray.run_dir import RunDir
from tests.unit.data.talks import talk
from tests.unit.data.test_store import write_store


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A run with a store of three examples, `c`, `d` and `e`, and a plan of one step for one rank."""
    maker = ConversationTokenizer(load_tokenizer(tiny_model_dir), DataConfig(prompt_loss_weight=0.1))
    examples = [maker.one(talk("Hi", f"[{answer}]")).examples[0] for answer in ("one", "two" * 1_000, "three")]
    for name, example in zip("cde", examples, strict=True):
        object.__setattr__(example, "example_id", name)
    run_dir = RunDir(tmp_path / "run")
    run_dir.store.parent.mkdir(parents=True)
    store = write_store(run_dir.store, [examples])
    settings = PlanSettings(capacity=5_000, packs_per_step=1, strategy="best_fit")
    make_plan(store.index, settings, cost=SequenceCost(1.0, 0.0)).save(run_dir.plan)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_dir: {run_dir.root}\nmodel:\n  path: {tiny_model_dir}\n", encoding="utf-8")
    return path


def inspect(capsys: pytest.CaptureFixture[str], recipe: Path, *options: str) -> tuple[int, str, str]:
    code = main(["inspect", str(recipe), *options])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_an_example_by_row_and_by_id(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = inspect(capsys, recipe)
    assert code == 0
    assert out == (
        "c: example 0 of 3, 28 tokens, 27 targets of weight 8.10 in all\n"
        "<|im_start|>[[10 %: user\nHi<|im_end|>\n<|im_start|>assistant\n]][[[one]<|im_end|>]][[10 %: \n]]\n"
    )
    assert "[[[three]<|im_end|>]]" in inspect(capsys, recipe, "--id", "e")[1]
    short, whole = inspect(capsys, recipe, "--example", "1")[1], inspect(capsys, recipe, "--example", "1", "--full")[1]
    assert "characters ..." in short
    assert "two" * 1_000 in whole


def test_a_pack(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = inspect(capsys, recipe, "--pack", "0,0,0")
    assert code == 0
    assert out.startswith("step 0, micro-step 0, group 0: 3 sequences, ")
    assert out.count("positions 0 to ") == 3


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--example", "3"), 1, "has 3 examples"),
        (("--example", "-1"), 1, "has 3 examples"),
        (("--id", "x"), 1, "no example of the store"),
        (("--pack", "0,0"), 2, "STEP,MICRO,GROUP"),
        (("--pack", "1,0,0"), 1, "the plan has 1 steps"),
    ],
)
def test_what_does_not_exist_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], code: int, message: str
) -> None:
    got, out, err = inspect(capsys, recipe, *options)
    assert (got, out) == (code, "")
    assert message in " ".join(err.split())


def test_nothing_prepared(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (RunDir(recipe.parent / "run").store / "index.parquet").unlink()
    code, _, err = inspect(capsys, recipe)
    assert code == 1
    assert "longalign prepare" in " ".join(err.split())
