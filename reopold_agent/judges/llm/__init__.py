"""Judges that read prose, asked where the rules find no answer (docs/judges.md)."""

from reopold_agent.judges.llm.base import (
    Backend,
    Completion,
    Equal,
    Extract,
    How,
    JudgeReply,
    JudgeRequest,
    Prompt,
    ProseJudge,
)
from reopold_agent.judges.llm.failures import JudgeError, TransientError, UndecidedError
from reopold_agent.judges.llm.judge import LlmJudge
from reopold_agent.judges.llm.none import NoJudge
from reopold_agent.judges.llm.registry import LLM_JUDGES, JudgeMaker, judge_of, make_judge

__all__ = [
    "LLM_JUDGES",
    "Backend",
    "Completion",
    "Equal",
    "Extract",
    "How",
    "JudgeError",
    "JudgeMaker",
    "JudgeReply",
    "JudgeRequest",
    "LlmJudge",
    "NoJudge",
    "Prompt",
    "ProseJudge",
    "TransientError",
    "UndecidedError",
    "judge_of",
    "make_judge",
]
