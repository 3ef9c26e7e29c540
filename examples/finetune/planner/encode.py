"""Pairs as tokens: what is read, and what is learned."""

from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.common.errors import WeightsError
from examples.finetune.planner.prompts import Pair
from examples.pretrained.chat import ChatTemplate


class Row(NamedTuple):
    """One pair."""

    tokens: np.ndarray  # (n,) int32: the prompt, the plan and the end mark.
    prompt: int  # How many of them are read only: the others are learned.

    @property
    def learned(self) -> int:
        return len(self.tokens) - self.prompt


class Chat(NamedTuple):
    """Form of a conversation with a model."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: prompt and plan as they are, one after the other.
    end_ids: tuple[int, ...]  # Tokens that end an answer, at least one.

    def encode(self, pair: Pair) -> Row:
        """The prompt as the user's message and the plan as the answer.

        Prompt and answer are encoded apart, so that what is learned after is what is given when a
        plan is to be written. The answer ends with its first end mark; what a template puts
        behind it is not learned.

        Raises:
          WeightsError: if a conversation does not go on as the template begins an answer.
        """
        before, answer = self._texts(pair)
        # A template writes the first token of a text itself.
        prompt = self.tokenizer.encode(before, add_special_tokens=self.template is None).ids
        ids = self.tokenizer.encode(answer, add_special_tokens=False).ids
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        mark = ids[end] if end < len(ids) else self.end_ids[0]
        return Row(np.array([*prompt, *ids[:end], mark], np.int32), len(prompt))

    def holds_special_token(self, text: str) -> bool:
        """Whether a text would be read as more than its words: as the end of an answer, say."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return any(token.special and token.content in text for token in added)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def _texts(self, pair: Pair) -> tuple[str, str]:
        if self.template is None:
            return pair.prompt, pair.completion
        question = {"role": "user", "content": pair.prompt}
        answer = {"role": "assistant", "content": pair.completion}
        before = self.template.render([question])
        whole = self.template.render([question, answer], add_generation_prompt=False)
        if not whole.startswith(before):
            raise WeightsError(
                "the chat template begins an answer in one way and shows it in another: "
                f"{before[-40:]!r}, {whole[len(before) - 40 :][:40]!r}"
            )
        return before, whole[len(before) :]
