"""The 21 sets of LongBench v1 (arXiv 2308.14508): what each asks for, how it is asked and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass

FEW_SHOT = "few-shot"
CODE = "code"
LANGUAGES = ("en", "zh")
# Length buckets of LongBench-E: upper limits, in words of an English and characters of a Chinese context.
BUCKETS = {"0-4k": 4_000, "4-8k": 8_000, "8k+": float("inf")}


@dataclass(frozen=True, slots=True)
class LongBenchSet:
    """One set; `metric` is a key of METRICS, `in_e` whether LongBench-E has it as well."""

    name: str
    category: str
    language: str
    num_rows: int
    metric: str
    max_new_tokens: int
    in_e: bool = False

    @property
    def chat(self) -> bool:
        """Whether the prompt goes through the chat template: examples and code are to be continued as they stand."""
        return self.category not in (FEW_SHOT, CODE)

    @property
    def first_line(self) -> bool:
        """Whether only the first line of an answer counts: after it a model goes on with further examples."""
        return self.category == FEW_SHOT

    @property
    def averaged_in(self) -> tuple[str, ...]:
        """Languages whose average the set is part of; code is in both."""
        return LANGUAGES if self.category == CODE else (self.language,)


LONGBENCH_SETS = {
    row.name: row
    for row in (
        LongBenchSet("narrativeqa", "single-doc QA", "en", 200, "qa_f1", 128),
        LongBenchSet("qasper", "single-doc QA", "en", 200, "qa_f1", 128, in_e=True),
        LongBenchSet("multifieldqa_en", "single-doc QA", "en", 150, "qa_f1", 64, in_e=True),
        LongBenchSet("multifieldqa_zh", "single-doc QA", "zh", 200, "qa_f1_zh", 64),
        LongBenchSet("hotpotqa", "multi-doc QA", "en", 200, "qa_f1", 32, in_e=True),
        LongBenchSet("2wikimqa", "multi-doc QA", "en", 200, "qa_f1", 32, in_e=True),
        LongBenchSet("musique", "multi-doc QA", "en", 200, "qa_f1", 32),
        LongBenchSet("dureader", "multi-doc QA", "zh", 200, "rouge_l_zh", 128),
        LongBenchSet("gov_report", "summarization", "en", 200, "rouge_l", 512, in_e=True),
        LongBenchSet("qmsum", "summarization", "en", 200, "rouge_l", 512),
        LongBenchSet("multi_news", "summarization", "en", 200, "rouge_l", 512, in_e=True),
        LongBenchSet("vcsum", "summarization", "zh", 200, "rouge_l_zh", 512),
        LongBenchSet("trec", FEW_SHOT, "en", 200, "classification", 64, in_e=True),
        LongBenchSet("triviaqa", FEW_SHOT, "en", 200, "qa_f1", 32, in_e=True),
        LongBenchSet("samsum", FEW_SHOT, "en", 200, "rouge_l", 128, in_e=True),
        LongBenchSet("lsht", FEW_SHOT, "zh", 200, "classification", 64),
        LongBenchSet("passage_count", "synthetic", "en", 200, "count", 32, in_e=True),
        LongBenchSet("passage_retrieval_en", "synthetic", "en", 200, "retrieval", 32, in_e=True),
        LongBenchSet("passage_retrieval_zh", "synthetic", "zh", 200, "retrieval", 32),
        LongBenchSet("lcc", CODE, "code", 500, "code_similarity", 64, in_e=True),
        LongBenchSet("repobench-p", CODE, "code", 500, "code_similarity", 64, in_e=True),
    )
}


def bucket_of(length: int) -> str:
    """The length bucket; a length equal to a limit is in the next one."""
    return next(name for name, limit in BUCKETS.items() if length < limit)
