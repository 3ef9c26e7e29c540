"""The tokenizer and the chat template of a directory in the Hugging Face layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from examples.common.config import write_json
from examples.common.errors import WeightsError
from examples.pretrained.chat import ChatTemplate
from examples.pretrained.json_file import read_json

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """From `tokenizer.json`, without truncation and padding; None if there is no such file.

    Raises:
      WeightsError: if the file is damaged.
    """
    path = directory / TOKENIZER
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The bindings raise nothing more specific.
        raise WeightsError(f"{path}: not a tokenizer file of `tokenizers` ({error})") from error
    # A file may carry the truncation and padding of another use, which would drop or add tokens.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """From `chat_template.jinja` or `tokenizer_config.json`; None if neither has one.

    Of several templates, the one named default.
    """
    settings = read_json(directory / SETTINGS) if (directory / SETTINGS).exists() else {}
    text = settings.get("chat_template")
    if (directory / TEMPLATE).exists():
        text = (directory / TEMPLATE).read_text(encoding="utf-8")
    elif isinstance(text, list):
        text = {entry["name"]: entry["template"] for entry in text}.get("default")
    if text is None:
        return None
    return ChatTemplate(text, _tokens(settings))


def stated_end(tokenizer: Tokenizer, directory: Path) -> int | None:
    """Id of the eos_token of `tokenizer_config.json`; None without it.

    Raises:
      WeightsError: if the file is damaged.
    """
    settings = read_json(directory / SETTINGS) if (directory / SETTINGS).exists() else {}
    name = _tokens(settings).get("eos_token")
    return None if name is None else tokenizer.token_to_id(name)


def _tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    # A token is its text, or an object of which that is a part.
    found = {name: settings.get(name) for name in _NAMED}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items()}
    return {name: text for name, text in texts.items() if text and isinstance(text, str)}


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json`; an OSError if that fails."""
    # Its `save` raises a plain Exception, without the name of the file, when the disk is full.
    (directory / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def write_tokenizer(
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    tokens: Mapping[str, str],
    directory: Path,
) -> None:
    """Writes both, and `tokens` by names such as eos_token, for this module and transformers."""
    save_tokenizer(tokenizer, directory)
    template = {} if chat_template is None else {"chat_template": chat_template.text}
    write_settings({**tokens, **template}, directory)


def write_settings(settings: Mapping[str, Any], directory: Path) -> None:
    """Write `tokenizer_config.json`, by which transformers reads `tokenizer.json` as it is.

    Without it transformers takes the class of the architecture, whose defaults override the file:
    those of BERT make it lower-case.
    """
    fixed = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Otherwise transformers 4 deletes spaces before punctuation when it decodes.
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / SETTINGS, fixed | dict(settings))
