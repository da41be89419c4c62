"""LongBench v1 as a task, on rows and prompts that are made up but have the benchmark's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import EvaluateConfig, LongBenchConfig
from longalign_ray.errors import CorpusError, EvaluationError
from longalign_ray.evaluate.benchmark_rows import filled
from longalign_ray.evaluate.benchmarks import task_cases
from longalign_ray.evaluate.cut_prompt import without_middle
from longalign_ray.evaluate.longbench import longbench_cases
from longalign_ray.evaluate.longbench_score import score_directory
from longalign_ray.evaluate.longbench_sets import LONGBENCH_SETS
from longalign_ray.evaluate.runner import evaluate
from longalign_ray.evaluate.task import TaskInputs
from longalign_ray.run_dir import RunDir
from tests.unit.evaluate.stub_server import Reply, chat, stub_server
from tests.unit.evaluate.tokenizers import make_tokenizer

PROMPTS = {name: f"{name}: {{context}} Q: {{input}} A:" for name in LONGBENCH_SETS}
ROWS = {
    "hotpotqa": [("which colour?", "the sky is blue", ["blue"], 3_000), ("who?", "a {input} cat", ["a cat"], 9_000)],
    "trec": [("what type?", "examples", ["animal"], 5_000)],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer("bytes", scratch=scratch, data=scratch)


@pytest.fixture
def config(tmp_path: Path) -> LongBenchConfig:
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in ROWS.items():
        for suffix in ("", "_e"):
            lines = [
                {
                    "input": asked,
                    "context": context + suffix,
                    "answers": answers,
                    "length": length,
                    "dataset": name + suffix,
                    "language": "en",
                    "all_classes": ["animal", "place"] if name == "trec" else None,
                    "_id": f"{number:048x}",
                }
                for number, (asked, context, answers, length) in enumerate(rows)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (data / f"{name}{suffix}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    return LongBenchConfig(data=str(data), prompts=str(tmp_path / "dataset2prompt.json"), sets=("trec", "hotpotqa"))


def changed(config: LongBenchConfig, **changes: Any) -> LongBenchConfig:
    return LongBenchConfig.model_validate(config.model_dump() | changes)


def test_prompts_are_the_benchmarks_and_few_shot_sets_go_without_a_template(config: LongBenchConfig, tokenizer: Any):
    first, second, third = longbench_cases(config, tokenizer=tokenizer, seed=7)
    assert [case.case_id for case in (first, second, third)] == ["hotpotqa-0", "hotpotqa-1", "trec-0"]
    assert (first.path, first.request) == (
        "/chat/completions",
        {
            "messages": [{"role": "user", "content": "hotpotqa: the sky is blue Q: which colour? A:"}],
            "max_tokens": 32,
            "temperature": 0.0,
            "seed": 7,
        },
    )
    assert second.request["messages"][0]["content"] == "hotpotqa: a {input} cat Q: who? A:"
    assert (third.path, third.request["prompt"]) == ("/completions", "trec: examples Q: what type? A:")
    assert third.request["max_tokens"] == 64
    assert first.num_tokens == len("hotpotqa: the sky is blue Q: which colour? A:")
    assert [case.case_id for case in longbench_cases(changed(config, rows_per_set=1), tokenizer=tokenizer, seed=7)] == [
        "hotpotqa-0",
        "trec-0",
    ]


def test_longbench_e_reads_its_own_files(config: LongBenchConfig, tokenizer: Any):
    cases = longbench_cases(changed(config, extended=True), tokenizer=tokenizer, seed=0)
    assert cases[0].request["messages"][0]["content"] == "hotpotqa: the sky is blue_e Q: which colour? A:"
    with pytest.raises(EvaluationError, match="names lsht, and LongBench-E has qasper, multifieldqa_en"):
        longbench_cases(changed(config, extended=True, sets=("lsht",)), tokenizer=tokenizer, seed=0)


@pytest.mark.parametrize("limit", [2, 9, 10, 25, 26])
def test_the_middle_goes_and_twice_half_the_limit_stays(limit: int, tokenizer: Any):
    text = "abcdefghijklmnopqrstuvwxyz"
    cut, num_tokens = without_middle(text, max_tokens=limit, tokenizer=tokenizer)
    half = limit // 2
    assert num_tokens == len(cut) == (26 if limit == 26 else 2 * half)
    assert cut == text[:half] + text[-half:] if limit < 26 else text
    assert without_middle(text[:limit], max_tokens=limit, tokenizer=tokenizer) == (text[:limit], limit)


def test_special_tokens_count_and_are_not_in_the_text(tokenizer: Any):
    """As where a tokenizer puts a BOS before every text: it takes a place of the first half."""

    def with_bos(text: str, **arguments: Any) -> dict[str, list[int]]:
        return {"input_ids": [tokenizer.bos_token_id, *tokenizer(text, **arguments)["input_ids"]]}

    with_bos.decode = tokenizer.decode  # pyright: ignore[reportFunctionMemberAccess]
    assert without_middle("abcdefgh", max_tokens=6, tokenizer=with_bos) == ("abfgh", 6)


def test_the_cut_comes_before_the_template(config: LongBenchConfig, tokenizer: Any):
    case = longbench_cases(changed(config, max_prompt_tokens=11), tokenizer=tokenizer, seed=0)[0]
    assert case.request["messages"][0]["content"] == "hotpour? A:"[:5] + "r? A:"
    assert case.num_tokens == 10


def test_what_a_value_holds_is_no_placeholder():
    assert filled("{a}-{b}", {"a": "{b}", "b": "{a}"}, placeholder=r"\{(a|b)\}") == "{b}-{a}"


def test_scores_manifest_and_published_predictions(config: LongBenchConfig, tokenizer: Any, tmp_path: Path):
    def behave(body: dict[str, Any], attempt: int) -> Reply:
        if body["path"] == "/v1/completions":
            text = "\nanimal\nQ: what else?" if body["model"] == "aligned" else "place"
            return Reply({"choices": [{"index": 0, "text": text, "finish_reason": "length"}]})
        if "who?" in body["messages"][0]["content"] and body["model"] == "base":
            return Reply({}, status=400)
        return chat("blue cat")

    run_dir = RunDir(tmp_path / "run")
    settings = EvaluateConfig(needle=None, heldout_loss=False, longbench=config, max_attempts=1)
    with stub_server(behave) as stub:
        cases = task_cases(settings, TaskInputs([], "", tokenizer, seed=0))
        counts, failed = evaluate(settings, run_dir, base_url=stub.base_url, cases=cases)
    # F1 of "blue cat" with "blue" and with "a cat": 2/3 each. Of base only the first is answered.
    assert counts["aligned_longbench"] == pytest.approx((0.6667 + 1) / 2)
    assert counts["base_longbench"] == pytest.approx(0.6667 / 2)
    assert (counts["cases"], counts["answered"], sum(failed.values())) == (6, 5, 1)
    score = json.loads((run_dir.scores / "longbench-base.json").read_text(encoding="utf-8"))
    assert score["rows"]["hotpotqa"] == {"scored": 1, "unscored": 1, "published": 200}
    assert (score["scores"], score["num_cases"]) == ({"hotpotqa": 66.67, "trec": 0.0}, 2)
    assert score["averages"] == {"en": None, "zh": None}
    # The files hold what the benchmark's own scorer reads, and our own scores them alike.
    published = run_dir.predictions / "longbench-aligned"
    assert json.loads((published / "trec.jsonl").read_text(encoding="utf-8")) == {
        "pred": "\nanimal\nQ: what else?",
        "answers": ["animal"],
        "all_classes": ["animal", "place"],
        "length": 5_000,
    }
    again = score_directory(published)
    told = json.loads((run_dir.scores / "longbench-aligned.json").read_text(encoding="utf-8"))
    assert (again.scores, again.buckets) == (told["scores"], told["buckets"])
    assert again.buckets["hotpotqa"] == {"0-4k": 66.67, "4-8k": None, "8k+": 66.67}


def test_what_is_not_on_disk_is_told_with_the_way_to_get_it(config: LongBenchConfig, tokenizer: Any, tmp_path: Path):
    def told(**changes: Any) -> str:
        with pytest.raises(EvaluationError) as raised:
            longbench_cases(changed(config, **changes), tokenizer=tokenizer, seed=0)
        return str(raised.value)

    assert "lsht.jsonl cannot be read (No such file or directory); unpack data.zip" in told(sets=("lsht",))
    assert "give the path of config/dataset2prompt.json" in told(prompts=str(tmp_path / "none.json"))
    assert "evaluate.longbench.sets names hotpot, and LongBench has narrativeqa" in told(sets=("hotpot",))
    (tmp_path / "few.json").write_text('{"qasper": "{context}"}')
    assert "few.json has no hotpotqa; give the path of" in told(prompts=str(tmp_path / "few.json"))
    (tmp_path / "few.json").write_text('{"qasper": ')
    assert "few.json is not JSON" in told(prompts=str(tmp_path / "few.json"))
    path = Path(config.data) / "hotpotqa.jsonl"
    path.write_text('{"input": "a", "context": "b", "answers": "c", "length": 1, "all_classes": null}\n')
    assert f"{path}, line 1 lacks answers, or it is of the wrong type" in told()
    path.write_text('{"input": "a", "context": "b", "answers": [1], "length": 1, "all_classes": null}\n')
    assert f"{path}, row 1: the field 'answers' is '[1]'" in told()
    trec = Path(config.data) / "trec.jsonl"
    trec.write_text('{"input": "a", "context": "b", "answers": ["c"], "length": 1, "all_classes": null}\n')
    assert f"{trec}, row 1: all_classes is empty" in told(sets=("trec",))
    path.write_text("{}\n{")
    assert f"{path}, line 2 is not JSON" in told()
    path.write_text("\n")
    assert "hotpotqa.jsonl holds no row" in told()


def test_rows_of_a_data_set_are_read_in_their_order(config: LongBenchConfig, tokenizer: Any, tmp_path: Path):
    """A directory of the form that the hub has, read by the package `datasets`."""
    pytest.importorskip("datasets")
    (Path(config.data) / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}.jsonl\n" for name in ROWS)
        + "---\n"
    )
    from_hub = longbench_cases(changed(config, data=f"hf://{config.data}"), tokenizer=tokenizer, seed=0)
    assert from_hub == longbench_cases(config, tokenizer=tokenizer, seed=0)
    with pytest.raises(CorpusError, match="neither a file here nor a data set"):
        longbench_cases(changed(config, data=f"hf://{config.data}", sets=("lcc",)), tokenizer=tokenizer, seed=0)
