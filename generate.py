"""Continue a text with a trained model.

    python generate.py checkpoint=runs/quickstart prompt="It is a truth" max_new_tokens=200
    python generate.py checkpoint=runs/quickstart interactive=true

Text goes to standard output, tokens per second to standard error. Every key is in
``mamba2lm/inference/config.py``; ``python generate.py --help`` lists them.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from mamba2lm.cli import script
from mamba2lm.inference.config import GenerateConfig
from mamba2lm.schema import ConfigError


@script("generate", GenerateConfig)
def main(config: GenerateConfig) -> None:
    """Read the prompt, load the model, write text."""
    config.validate()
    prompt = read_prompt(config)
    # A line end or a tab is hard to type in an override.
    config.sampling.stop = [unescape(stop) for stop in config.sampling.stop]

    for name in ("json_schema", "grammar"):
        if (file := getattr(config, name)) is not None:
            setattr(config.sampling, name, read_text(name, file))

    from mamba2lm.inference.engine import Engine
    from mamba2lm.inference.interactive import converse
    from mamba2lm.inference.loading import load_run
    from mamba2lm.inference.session import Session

    run = load_run(config.checkpoint, device=config.device, dtype=config.dtype)
    for key in ("save_state", "load_state"):
        if run.model.tensor is not None and getattr(config, key) is not None:
            raise ConfigError(
                key, getattr(config, key), "is for one process; of a shared model each has a part."
            )
    if run.tokenizer is None:
        raise ConfigError(
            "checkpoint",
            config.checkpoint,
            "the model was trained without a tokenizer, on a synthetic task; "
            "generation needs one trained on text.",
        )
    engine = Engine(
        run.model,
        run.tokenizer,
        prefill_chunk=config.prefill_chunk,
        max_rows=min(config.samples, config.max_rows),
        state_dtype=config.state_dtype,
    )
    if config.samples > 1:
        completions = engine.generate(
            [prompt or ""] * config.samples,
            config.sampling,
            max_new_tokens=config.max_new_tokens,
            seeds=config.seed,
        )
        shown = prompt if config.echo and prompt else ""
        write("\n\n".join(shown + completion.text for completion in completions) + "\n")
        # The samples were prefilled and decoded together.
        report(
            completions[0].prompt_tokens,
            completions[0].prefill_seconds,
            sum(len(completion.token_ids) for completion in completions),
            max(completion.decode_seconds for completion in completions),
        )
        return

    session = Session(engine)
    if config.load_state is not None:
        session.load(config.load_state, run.fingerprint)
    if config.interactive:
        converse(session, config, prompt)
    else:
        pieces = session.stream(
            prompt or "",
            config.sampling,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        if not config.stream:
            pieces = iter(list(pieces))
        if config.echo and prompt:
            write(prompt)
        for piece in pieces:
            write(piece)
        write("\n")
    if session.last is not None:
        last = session.last
        report(last.prompt_tokens, last.prefill_seconds, len(last.token_ids), last.decode_seconds)
    if config.save_state is not None:
        session.save(config.save_state, run.fingerprint)


def read_prompt(config: GenerateConfig) -> str | None:
    """Return the prompt from wherever it is given; None where there is none and none is needed.

    Of a file and of standard input one final line end is left out: editors and ``echo`` add it.

    Raises:
        ConfigError: None is given, it is empty, or it is not UTF-8.
    """
    if config.prompt is not None:
        text, key, value = config.prompt, "prompt", config.prompt
    elif config.prompt_file is not None:
        key, value = "prompt_file", config.prompt_file
        text = read_text(key, value)
    elif config.interactive:
        return None
    elif sys.stdin is not None and not sys.stdin.isatty():
        key, value = "prompt", "(standard input)"
        text = decode(sys.stdin.buffer.read(), key, value)
    else:
        key, value, text = "prompt", None, ""
    if text or config.load_state is not None:
        return text
    raise ConfigError(key, value, "is empty; give prompt=…, prompt_file=… or standard input.")


def read_text(key: str, file: str) -> str:
    """Return what a file holds, less one final line end.

    Raises:
        ConfigError: It cannot be read, or it is not UTF-8.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(
            key, file, f"cannot be read: {error.strerror}; give a text file."
        ) from error
    return decode(content, key, file)


def decode(content: bytes, key: str, value: str) -> str:
    """Decode UTF-8, less one final line end.

    Raises:
        ConfigError: Naming the offset of the first byte that is not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte order mark.
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        raise ConfigError(
            key,
            value,
            f"is not UTF-8: byte 0x{content[offset]:02x} at offset {offset}; "
            "convert it, for example with iconv -t UTF-8.",
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def unescape(text: str) -> str:
    r"""Return ``text`` with ``\n``, ``\t`` and ``\\`` as a line end, a tab and a backslash."""
    meant = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: meant[match[1]], text)


def quoted(argument: str) -> str:
    """Quote the prompt for Hydra, which would read its commas and brackets as syntax.

    What the shell hands over after ``prompt=`` is the prompt, quotation marks included.
    """
    key, equals, text = argument.partition("=")
    if key != "prompt" or not equals:
        return argument
    # "${" would begin an interpolation, which a backslash prevents if no other precedes it.
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
    # Within Hydra's quotes a backslash counts only before a quote.
    text = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"prompt='{text}'"


def write(text: str) -> None:
    """Write text to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def report(prompt_tokens: int, prefill: float, new_tokens: int, decode_seconds: float) -> None:
    """Write tokens per second, of the prompt and of the text apart, to standard error."""
    sys.stderr.write(
        f"prompt {prompt_tokens:,} tokens, {prompt_tokens / max(prefill, 1e-9):,.0f} tokens/s; "
        f"text {new_tokens:,} tokens, {new_tokens / max(decode_seconds, 1e-9):,.0f} tokens/s\n"
    )


if __name__ == "__main__":
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the text has left; nor may the last flush at exit complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
