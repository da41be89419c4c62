"""What is measured, and by whom it is judged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from longalign_ray.config.section import Count, Section, key_place


class NeedleConfig(Section):
    """Needle in a haystack (LongAlign appendix C.3): a fact at a given depth of a long text."""

    lengths: tuple[PositiveInt, ...] = (512, 1_024, 2_048)
    """Prompt lengths in tokens."""
    depths: tuple[Annotated[float, Field(ge=0.0, le=100.0)], ...] = (10, 30, 50, 70, 90)
    """Depths of the needle in per cent."""
    distractors: Annotated[int, Field(ge=0, le=8)] = 0
    """Facts of the needle's form about other places that stand in the text as well: harder, as a model must tell them
    apart (RULER's needles with several keys)."""
    max_new_tokens: PositiveInt = 32
    """Tokens generated for an answer."""


class RulerConfig(Section):
    """RULER (arXiv 2404.06654): thirteen tasks of retrieval, tracing, aggregation and questions, at exact lengths."""

    lengths: tuple[PositiveInt, ...] = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
    """Tokens of prompt and answer together, as the benchmark counts them."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks; none: all, qa_1 and qa_2 only where `squad` and `hotpotqa` are given."""
    samples: PositiveInt = 500
    """Prompts of each task at each length. The scores of fewer tell less than those of the benchmark's 500."""
    prompts: str | None = None
    """The benchmark's own directory scripts/data/synthetic, whose wording is then used; none: this package's wording of
    the same tasks, whose scores compare with each other and not with published ones."""
    squad: str | None = None
    """The development set of SQuAD 2.0 as published, dev-v2.0.json, for qa_1."""
    hotpotqa: str | None = None
    """The development set of HotpotQA as published, hotpot_dev_distractor_v1.json, for qa_2."""
    answer_prefix: Literal["assistant", "user"] = "assistant"
    """Whose words the beginning of the answer is: the assistant's, as the benchmark has it for models that it runs,
    which takes /v1/completions; or the end of the user's message, as it has it for chat endpoints."""


class LongBenchConfig(Section):
    """LongBench v1 (arXiv 2308.14508): 21 sets of long documents with questions, English, Chinese and code."""

    data: str
    """Directory with a file `<set>.jsonl` a set (`<set>_e.jsonl` of LongBench-E), as in the data set's data.zip; or an
    address of the Hugging Face hub, `hf://ORG/NAME`, whose configurations are the sets."""
    prompts: str
    """The benchmark's own `dataset2prompt.json`."""
    sets: tuple[str, ...] | None = None
    """Names of the sets; none: all."""
    extended: bool = False
    """LongBench-E: 13 of the sets, with rows spread evenly over lengths."""
    max_prompt_tokens: Annotated[int, Field(ge=2)] = 31_500
    """Longer prompts lose their middle; the benchmark takes 3,500 for a context of 4k tokens, 7,500, 15,500, 31,500."""
    rows_per_set: PositiveInt | None = None
    """Only the first rows of each set; none: all. The scores of some rows are no scores of LongBench."""


class LongBenchV2Config(Section):
    """LongBench v2 (arXiv 2412.15204): 503 questions with four choices about contexts of 8k to 2M words."""

    data: str = "hf://THUDM/LongBench-v2"
    """The benchmark's data.json, or its address on the Hugging Face hub."""
    prompts: str
    """The benchmark's own directory `prompts`."""
    chain_of_thought: bool = False
    """Let the model think first, then ask for the choice: two requests a question."""
    max_prompt_tokens: Annotated[int, Field(ge=2)] = 120_000
    """Longer prompts lose their middle."""
    rows: PositiveInt | None = None
    """Only the first questions; none: all."""


class LongEvalConfig(Section):
    """LongEval of LongChat: retrieval of a line's number, and of the first topic of a conversation."""

    data: str
    """Directory with files `N_lines.jsonl` and `N_topics.jsonl`."""
    rows_per_file: PositiveInt | None = None
    """Only the first cases of each file; none: all."""


class LongBenchChatConfig(Section):
    """LongBench-Chat (LongAlign section 3.4): 50 real questions about long documents, answers rated by `judge`."""

    data: str
    """The benchmark's questions: JSON or JSON lines with idx, prompt (document and question), query, answer."""
    few_shots: str
    """The benchmark's own few_shots.json: three rated answers to each question."""
    judge_prompt: str
    """Text file with the benchmark's prompt to the judge."""
    max_prompt_tokens: Annotated[int, Field(ge=2)] = 64_000
    """Longer prompts lose their middle."""
    max_new_tokens: PositiveInt = 1_024
    """Tokens generated for an answer."""
    judgements: PositiveInt = 2
    """Times that an answer is rated, each time with the examples in another order; the mean counts."""
    one_line_answers: bool = False
    """Show answers to the judge with new lines as spaces, as the benchmark's own script does."""
    rows: PositiveInt | None = None
    """Only the first questions; none: all."""


class MTBenchConfig(Section):
    """MT-Bench (arXiv 2306.05685): 80 questions of two turns in eight categories, each answer rated by `judge`."""

    questions: str
    """The benchmark's own question.jsonl."""
    reference_answers: str
    """The benchmark's own reference answers, such as reference_answer/gpt-4.jsonl."""
    judge_prompts: str
    """The benchmark's own judge_prompts.jsonl."""
    max_new_tokens: PositiveInt = 1_024
    """Tokens generated for an answer."""
    rows: PositiveInt | None = None
    """Only the first questions; none: all."""


class LmEvalConfig(Section):
    """Short tasks of EleutherAI's lm-evaluation-harness (extra `short`), which show that short abilities hold."""

    tasks: Annotated[dict[str, Count | None], Field(min_length=1)] = Field(
        default_factory=lambda: {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5}
    )
    """Names of tasks or groups with their numbers of examples in the prompt, null for the task's own; by default those
    of LongAlign, as on the Open LLM Leaderboard."""
    limit: PositiveInt | None = None
    """Only the first questions of each task; none: all."""
    include_path: str | None = None
    """Directory with YAML files of further tasks."""


class JudgeConfig(Section):
    """A model that rates answers, behind any OpenAI-compatible endpoint."""

    endpoint: str | None = None
    """Base URL, such as https://HOST/v1."""
    model: str
    """The judge's name there."""
    api_key: Annotated[str | None, key_place("evaluate.judge.api_key")] = None
    """Where the key is, `env:NAME` or `file:PATH`; none: no key is sent."""
    replay: str | None = None
    """Recorded replies in place of the endpoint: a file `*.judgements.jsonl` of an earlier run."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Sampling temperature."""
    max_new_tokens: PositiveInt | None = None
    """Tokens of a judgement at most; none: 256 for LongBench-Chat, 2,048 for MT-Bench, whose judge explains first."""
    concurrency: PositiveInt = 4
    """Requests in flight at a time."""
    request_timeout_seconds: PositiveFloat = 120
    """Limit for one judgement."""
    max_attempts: PositiveInt = 5
    """Tries for a request that timed out or was answered with 429 or 5xx."""
    price_per_million_prompt_tokens: Annotated[float, Field(ge=0.0)] | None = None
    """For the estimate of the cost that is shown before the run."""
    price_per_million_completion_tokens: Annotated[float, Field(ge=0.0)] | None = None
    """For the estimate of the cost that is shown before the run."""

    @model_validator(mode="after")
    def _endpoint_or_replay(self) -> JudgeConfig:
        if (self.endpoint is None) == (self.replay is None):
            raise ValueError("evaluate.judge takes one of endpoint and replay: set one of them")
        return self


class EvaluateConfig(Section):
    """What is measured, before (`base`) and after (`aligned`) training."""

    endpoint: str | None = None
    """Base URL of a running OpenAI-compatible server; none: the recipe's own application is started."""
    api_key: Annotated[str | None, key_place("evaluate.api_key")] = None
    """Where the key for `endpoint` is, `env:NAME` or `file:PATH`; the recipe's own application takes serve.api_keys."""
    models: tuple[str, ...] = ("base", "aligned")
    """Model names asked of the endpoint."""
    concurrency: PositiveInt = 8
    """Requests in flight at a time; more than the server computes together keep it busy between two of them."""
    request_timeout_seconds: PositiveFloat = 600
    """Limit for one answer."""
    max_attempts: PositiveInt = 4
    """Tries for a request that timed out or was answered with 429 or 5xx."""
    needle: NeedleConfig | None = NeedleConfig()
    """Needle grid; null leaves it out."""
    ruler: RulerConfig | None = None
    """RULER; null leaves it out."""
    longbench: LongBenchConfig | None = None
    """LongBench v1; null leaves it out."""
    longbench_v2: LongBenchV2Config | None = None
    """LongBench v2; null leaves it out."""
    longeval: LongEvalConfig | None = None
    """LongEval; null leaves it out."""
    longbench_chat: LongBenchChatConfig | None = None
    """LongBench-Chat; null leaves it out."""
    mt_bench: MTBenchConfig | None = None
    """MT-Bench; null leaves it out."""
    judge: JudgeConfig | None = None
    """The model that rates the answers of the tasks that are judged."""
    lm_eval: LmEvalConfig | None = None
    """Short tasks; null leaves them out."""
    heldout_loss: bool = True
    """Loss of the held-out examples, from the log-probabilities that the endpoint returns."""

    @model_validator(mode="after")
    def _judged_tasks_have_a_judge(self) -> EvaluateConfig:
        for name, judged in (("longbench_chat", self.longbench_chat), ("mt_bench", self.mt_bench)):
            if judged is not None and self.judge is None:
                raise ValueError(
                    f"evaluate.{name} is judged, and evaluate.judge is not set: set judge.endpoint and judge.model"
                )
        return self
