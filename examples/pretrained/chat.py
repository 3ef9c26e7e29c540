"""Messages as the text that a model was trained on."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from examples.common.errors import WeightsError


class ChatTemplate(NamedTuple):
    """The Jinja template that comes with a model."""

    text: str
    tokens: Mapping[str, str]  # What templates call bos_token, eos_token and so on.

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The messages as one text, to be encoded with `add_special_tokens=False`.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": text}, in order.
          add_generation_prompt: end with the beginning of an answer; without it, messages that
            end with an answer are a text to train on.

        Raises:
          WeightsError: if the template cannot be used or refuses the messages.
        """
        try:
            import jinja2.sandbox  # Only models with a template need it.
        except ImportError as error:
            raise WeightsError(
                "a chat template needs jinja2: python -m pip install jinja2"
            ) from error

        # As transformers renders them; the sandbox, because a template is a program of others.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        variables = {**self.tokens, "raise_exception": _refuse}
        try:
            return environment.from_string(self.text).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except jinja2.TemplateError as error:
            raise WeightsError(f"the chat template fails: {error}") from error


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
