"""`apt generate` and `apt chat`: the commands that write text."""

from __future__ import annotations

import signal
import sys
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from apt.cli.run_commands import of_the_run
from apt.cli.screen import CONTROLS
from apt.core.errors import AptError, ConfigError, DataError
from apt.core.files import LARGEST
from apt.core.runs import find_run

if TYPE_CHECKING:
    from apt.core.providers.voter import VoterProvider
    from apt.inference.chat import Chat
    from apt.inference.rows import Completion, Vote

BETWEEN = "---"
"""The line between several texts."""

LONGEST_ANSWER = 40

BYTE_ORDER_MARK = "\ufeff"
"""What some editors begin a file with; it is no part of the text."""

CHAT_HELP = """\
Write a message and press Enter. Ctrl-C ends a reply.
/reset  forget what was said
/help   show this
/exit   leave, as Ctrl-D does"""


def run_generate_command(args: Namespace) -> int:
    """Write prompts and their continuations to standard output; a single one as it comes."""
    prompts = _prompts(args)
    run = find_run(args.run_name)

    from apt.inference.generator import Generator

    generator = Generator.from_run(run, options=args, **of_the_run(args))
    voter = generator.voter(args.voter) if args.voter else None
    settings = _settings(args, voter)
    if len(prompts) == 1 and args.samples == 1 and not args.json:
        shown = "" if generator.writes_targets else prompts[0]
        _write_as_it_comes(shown, generator.stream(prompts[0], **settings))
        if voter is not None:
            generator.note(tell(voter, generator.votes))
        return 0
    completions = generator.complete(prompts, samples=args.samples, batch_size=args.batch_size, **settings)
    for index, completion in enumerate(completions):
        if args.json:
            _write(_as_json(completion) + "\n")
        else:
            shown = "" if generator.writes_targets else completion.prompt
            _write((f"{BETWEEN}\n" if index else "") + shown + completion.text + "\n")
        if voter is not None:
            generator.note(f"{index + 1}: {tell(voter, completion.votes)}")
    return 0


def run_chat_command(args: Namespace) -> int:
    """Answer messages from standard input, line by line, until it ends."""
    run = find_run(args.run_name)

    from apt.inference.chat import Chat
    from apt.inference.generator import Generator

    generator = Generator.from_run(run, options=args, **of_the_run(args))
    voter = generator.voter(args.voter) if args.voter else None
    chat = Chat(generator, **_settings(args, voter))
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (lets `input` edit its line)
        print(f"Chat with {run.path}\n{CHAT_HELP}")
    for line in _lines(on_terminal):
        if line == "/exit":
            break
        if line == "/reset":
            chat.reset()
        elif line == "/help":
            print(CHAT_HELP, file=sys.stdout if on_terminal else sys.stderr)
        elif line.startswith("/"):
            print(f"there is no {line.split()[0]}; see /help", file=sys.stderr)
        elif line:
            _answer(chat, line, voter)
    return 0


def tell(voter: VoterProvider, votes: Sequence[Vote]) -> str:
    """What the votes on one text came to, in one line."""
    name = voter.get_name()
    if voter.length is not None or len(votes) != 1:
        agreed = sum(max(Counter(vote.answers).values()) > len(vote.answers) / 2 for vote in votes)
        held = "1 vote" if len(votes) == 1 else f"{len(votes)} votes"
        return f"{name}: {held}, {agreed} of them with a majority" if votes else f"{name}: no vote was needed"
    (vote,) = votes
    tally = Counter(answer for answer in vote.answers if answer is not None).most_common()
    if not tally:
        return f"{name}: none of {len(vote.answers)} texts holds an answer; the likeliest is kept"
    parts = [f"{_short(answer)} x {count}" for answer, count in tally]
    silent = vote.answers.count(None)
    parts += [f"{silent} without an answer"] if silent else []
    kept = "" if tally[0][1] > 1 else "; no two agree, the likeliest is kept"
    return f"{name}: of {len(vote.answers)} texts, {', '.join(parts)}{kept}"


def _short(answer: str) -> str:
    return repr(answer if len(answer) <= LONGEST_ANSWER else answer[: LONGEST_ANSWER - 3] + "...")


def _settings(args: Namespace, voter: VoterProvider | None) -> dict[str, Any]:
    """What `Generator.stream` and its like take."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    stops = [_unescaped(stop) for stop in args.stop]
    return {name: getattr(args, name) for name in names} | {
        "max_new_tokens": args.max_tokens, "stop": stops, "voter": voter,
    }  # fmt: skip


def _unescaped(text: str) -> str:
    """`\\n` and `\\t` as the shell's user means them."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


# What goes in


def _prompts(args: Namespace) -> list[str]:
    """The prompts as they were given: the options' texts, and the lines of a file."""
    given = [_read_prompt(text) for text in args.prompt]
    if args.prompts is None:
        return given or [""]
    try:
        text = _read_all(args.prompts)
    except UnicodeDecodeError as error:
        raise DataError(f"{args.prompts}: not UTF-8 at byte {error.start}", hint="give UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{args.prompts} cannot be read: {reason}", hint="give a file with a prompt a line") from error
    prompts = [*given, *(line for line in text.splitlines() if line)]
    if not prompts:
        raise DataError(f"{args.prompts} holds no prompt", hint="write one in each line")
    return prompts


def _read_all(path: str) -> str:
    """What a file holds, or standard input for "-", without a byte order mark. Raises DataError where that is too much:
    a pipe may have no end."""
    if path == "-":
        read: str | bytes = sys.stdin.read(LARGEST + 1)
    else:
        with open(path, "rb") as file:
            read = file.read(LARGEST + 1)
    if len(read) > LARGEST:
        where = "standard input" if path == "-" else path
        raise DataError(f"{where} is larger than {LARGEST >> 20} MiB", hint="give fewer prompts at once")
    text = _checked(read, "standard input") if isinstance(read, str) else read.decode("utf-8")
    return text.removeprefix(BYTE_ORDER_MARK)


def _read_prompt(text: str) -> str:
    """The prompt as it was given, or all of standard input for "-", without the line's end that a shell adds."""
    if text == "-":
        try:
            text = _read_all(text).removesuffix("\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input: not {error.encoding} at byte {error.start}", hint="give UTF-8 text"
            ) from error
    return _checked(text, "--prompt")


def _checked(text: str, where: str) -> str:
    """`text`, if it was UTF-8: in some locales Python hands on the bytes that are not, as surrogates."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where}: not UTF-8", hint="give UTF-8 text")
    return text


def _lines(on_terminal: bool) -> Iterator[str]:
    """The messages, until standard input ends."""
    mark = BYTE_ORDER_MARK
    while True:
        try:
            with _ctrl_c_raises(on_terminal):
                line = input("> ") if on_terminal else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(leave with /exit or Ctrl-D)")
            continue
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input: not {error.encoding} at byte {error.start}", hint="give UTF-8 text"
            ) from error
        if not line and not on_terminal:
            return
        yield _checked(line, "standard input").removeprefix(mark).strip()
        mark = ""


@contextmanager
def _ctrl_c_raises(wanted: bool = True) -> Iterator[None]:
    """Inside this block Ctrl-C raises KeyboardInterrupt, and does not leave the program."""
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# What comes out


def _answer(chat: Chat, message: str, voter: VoterProvider | None) -> None:
    """Write the reply to one message as it comes; Ctrl-C ends it."""
    try:
        with _ctrl_c_raises():
            for piece in chat.reply(message):
                _write(piece)
    except KeyboardInterrupt:
        _write(" ...")
    except (DataError, ConfigError) as error:
        _complain(error)
        return
    _write("\n")
    if voter is not None:
        chat.generator.note(tell(voter, chat.generator.votes))


def _complain(error: AptError) -> None:
    print(f"error: {error.message}" + (f"\n  fix: {error.hint}" if error.hint else ""), file=sys.stderr)


def _write_as_it_comes(prompt: str, pieces: Iterator[str]) -> None:
    first = next(pieces, "")  # what is wrong with the arguments shows here, before anything is written
    _write(prompt + first)
    for piece in pieces:
        _write(piece)
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text.translate(CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _as_json(completion: Completion) -> str:
    import json

    fields = {"prompt": completion.prompt, "text": completion.text, "ended": completion.ended}
    return json.dumps(fields, ensure_ascii=False)
