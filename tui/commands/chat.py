"""``steersman chat``: a conversation line by line, in the terminal's own scrollback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from steersman.core.errors import SteersmanError, UsageError, did_you_mean

from .. import common, output
from ..conversation import Conversation
from ..envelope import problem
from ..interrupts import ctrl_c_cancels
from ..roles import described, note_opening, open_roles, parse_roles, wanted
from ..tracing import Recorder, TraceArgs, trace_options

if TYPE_CHECKING:
    from steersman.core.model import Model
    from steersman.core.profile import Profile

HELP = """\
/profile [NAME]     show profiles, or decode with another one from now on
/set KEY=VALUE      change a parameter: /set temperature.t=0.5; /set alone takes all back
/show               print every effective setting and where it came from
/model [ROLE=]NAME  open another model; the conversation stays
/backend NAME       run the model on another engine
/regenerate [NAME]  answer the last message again, with another profile if one is named
/system [TEXT]      set the system message; without TEXT remove it
/clear              forget the conversation
/trace [FILE]       record how each token comes about; without FILE stop recording
/save FILE          write it to FILE: JSONL, or Markdown if the name ends in .md
/help               this list
/quit               leave (also Ctrl-D)

Ctrl-C stops an answer. A line that ends in \\ goes on in the next one. To send a line that
begins with /, write // instead."""


@click.command("chat", context_settings={"max_content_width": 100})
@common.option("-s", "--system", metavar="TEXT", help="System message.")
@common.models_options
@common.sampling_options
@trace_options
@common.output_options
def command(
    system: str | None,
    model_args: common.ModelArgs,
    sampling: common.SamplingArgs,
    trace_args: TraceArgs,
) -> None:
    """Chat line by line; /help lists what can be changed on the way.

    Lines may also come through a pipe: each is a message, answers go to stdout.
    """
    if output.state.json:
        raise UsageError("--json: chat has none; use steersman generate --chat --json")
    recorder = trace_args.recorder()
    with _Chat(Conversation(system=system), model_args, sampling, recorder) as chat:
        chat.loop()


class _Chat:
    """The loop, what it talks to, and the commands that change it."""

    def __init__(
        self,
        conversation: Conversation,
        model_args: common.ModelArgs,
        sampling: common.SamplingArgs,
        recorder: Recorder,
    ) -> None:
        self.conversation = conversation
        self.recorder = recorder
        self.model_args = model_args
        self.sampling = sampling
        self.failed = False
        self.profile = sampling.load_profile()
        self.roles = open_roles(model_args, self.profile, all_known=True)
        self.commands: dict[str, Callable[[str], None]] = {
            "profile": self.set_profile,
            "set": self.set_option,
            "show": self.show,
            "model": self.set_model,
            "backend": self.set_backend,
            "regenerate": self.regenerate,
            "system": self.set_system,
            "clear": self.clear,
            "trace": self.set_trace,
            "save": self.save,
            "help": lambda _: output.print_text(HELP),
        }

    def __enter__(self) -> _Chat:
        return self

    def __exit__(self, *exc: object) -> None:
        self.recorder.close()
        self.roles.close()

    @property
    def model(self) -> Model:
        """What answers."""
        return self.roles.target

    # -- the loop --------------------------------------------------------------------------

    def loop(self) -> None:
        """Read lines until the end."""
        typed = output.is_terminal(sys.stdin)
        if typed:
            self._enable_editing()
            info = self.model.info
            output.note(f"{info.name} on {info.backend}, profile {self.profile.name}; /help, /quit")
        while True:
            try:
                line = self._read(typed)
            except EOFError:
                if typed:
                    output.print_text()
                break
            except KeyboardInterrupt:
                if not typed:
                    raise
                output.print_text()
                output.note("/quit or Ctrl-D leaves")
                continue
            if not line.strip():
                continue
            if line.strip() in ("/quit", "/exit"):
                break
            self.handle(line)
        if self.failed and not typed:
            raise click.exceptions.Exit(common.PARTIAL)

    def _read(self, typed: bool) -> str:
        parts: list[str] = []
        while True:
            if typed:
                part = input("> " if not parts else ". ")
            else:
                part = sys.stdin.readline()
                if not part:
                    raise EOFError
                part = part.rstrip("\n")
            if not part.endswith("\\"):
                return "\n".join([*parts, part])
            parts.append(part[:-1])

    @staticmethod
    def _enable_editing() -> None:
        try:
            import readline  # noqa: F401 - gives input() history and editing
        except ImportError:
            pass

    def handle(self, line: str) -> None:
        """Run a command or answer a message; mistakes are reported and the chat goes on."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line[1:].partition(" ")
                if name not in self.commands:
                    known = [f"/{n}" for n in (*self.commands, "quit")]
                    raise UsageError(f"/{name}: no such command{did_you_mean('/' + name, known)}")
                self.commands[name](rest.strip())
            else:
                self.answer(line[1:] if line.startswith("//") else line)
        except SteersmanError as exc:
            self.failed = True
            output.error(problem(exc).message)

    def answer(self, text: str) -> None:
        """Send a message and show the answer as it comes."""
        from .. import generation  # not for --help: it imports NumPy

        conversation = self.conversation
        conversation.messages.append({"role": "user", "content": text})
        printer = generation.Printer(live=output.is_terminal(sys.stdout))
        try:
            with ctrl_c_cancels() as cancel:
                done = generation.run(
                    self.model,
                    conversation.prompt(),
                    self.profile,
                    printer=printer,
                    cancel=cancel,
                    session=self.roles.sessions,
                    models=self.roles.models,
                    recorder=self.recorder,
                    **self.sampling.stream_options(),
                )
        except BaseException:
            conversation.messages.pop()  # an unanswered message would change the next answer
            raise
        if not output.is_terminal(sys.stdout) and not done.text.endswith("\n"):
            output.write_generated("\n")
        if done.truncated:
            output.warn(f"the first {done.truncated} tokens of the conversation were cut")
        if done.finish_reason == "cancelled" and not done.text:
            conversation.messages.pop()
            output.note("cancelled; the message was taken back")
            return
        info = self.model.info
        conversation.messages.append(
            {
                "role": "assistant",
                "content": done.text,
                "model": info.name,
                "backend": info.backend,
                "profile": self.profile.name,
                "profile_fingerprint": self.profile.fingerprint,
                "seed": done.seed,
                "finish_reason": done.finish_reason,
                "timings": generation.timings_record(done.timings),
                **({"roles": roles} if (roles := described(self.roles.models)) else {}),
            }
        )
        if output.is_terminal(sys.stderr):
            output.note(f"{self.profile.name}: {generation.summary(done)}")

    # -- commands --------------------------------------------------------------------------

    def set_profile(self, name: str) -> None:
        """``/profile``."""
        from steersman.core.profile import list_profiles

        if not name:
            rows = [
                ["*" if e.name == self.profile.name else "", e.name, e.error or e.description]
                for e in list_profiles()
            ]
            print(output.table(rows))
            return
        # Flags belonged to the profile that the program was started with.
        sampling = common.SamplingArgs(
            profile=name,
            seed=self.sampling.seed,
            stop=self.sampling.stop,
            truncate=self.sampling.truncate,
        )
        self._change(sampling.load_profile())
        self.sampling = sampling
        output.note(f"profile {self.profile.name}: {self.profile.description}")

    def set_option(self, change: str) -> None:
        """``/set``."""
        options = (*self.sampling.option, change) if change else ()
        sampling = replace(self.sampling, option=options)
        self._change(sampling.load_profile())
        self.sampling = sampling
        output.note(", ".join(options) if options else "changes taken back")

    def show(self, _: str) -> None:
        """``/show``."""
        info = self.model.info
        rows = [["model", info.name, ""], ["backend", info.backend, ""]]
        rows += [[role, what, ""] for role, what in described(self.roles.models).items()]
        rows += [
            [s.key, "none" if s.value is None else str(s.value), s.origin]
            for s in self.profile.settings()
            if not s.key.startswith("models.")
        ]
        print(output.table(rows, header=["setting", "value", "from"]))

    def set_model(self, name: str) -> None:
        """``/model``."""
        if not name:
            output.print_text(f"{self.model.info.name} ({self.model.info.path})")
            return
        args = self.model_args
        if "=" in name:
            roles = parse_roles(None, (name,))
            origins = dict.fromkeys(roles, "flag")
            self._reopen(
                replace(
                    args,
                    roles={**args.roles, **roles},
                    role_origins={**args.role_origins, **origins},
                )
            )
            return
        self._reopen(replace(args, model=name, layers=None))

    def set_backend(self, name: str) -> None:
        """``/backend``."""
        if not name:
            output.print_text(self.model.info.backend)
            return
        self._reopen(replace(self.model_args, backend=name))

    def _reopen(self, args: common.ModelArgs) -> None:
        self._change(self.profile, args)
        output.note(f"{self.model.info.name} on {self.model.info.backend}")

    def _change(self, profile: Profile, args: common.ModelArgs | None = None) -> None:
        """Decode with another profile or other models from now on, or, on failure, as before."""
        args = args or self.model_args
        asked = wanted(args, profile, all_known=True)
        with ctrl_c_cancels() as cancel:
            self.roles.prepare(profile, asked, opening=note_opening, cancelled=cancel.is_set)
        self.profile, self.model_args = profile, args

    def regenerate(self, profile: str) -> None:
        """``/regenerate``."""
        if profile:
            self.set_profile(profile)
        before = list(self.conversation.messages)
        text = self.conversation.drop_answer()
        if text is None:
            raise UsageError("/regenerate: there is no answer yet")
        try:
            self.answer(text)
        except BaseException:
            self.conversation.messages[:] = before
            raise
        if len(self.conversation.messages) < len(before):  # cancelled before the first token
            self.conversation.messages[:] = before

    def set_system(self, text: str) -> None:
        """``/system``."""
        self.conversation.system = text or None
        output.note("system message set" if text else "system message removed")

    def clear(self, _: str) -> None:
        """``/clear``."""
        self.conversation.messages.clear()
        output.note("the conversation is forgotten")

    def set_trace(self, name: str) -> None:
        """``/trace``."""
        recorder = Recorder(Path(name).expanduser() if name else None)
        self.recorder.close()
        self.recorder = recorder
        output.note(f"recording to {name}" if name else "nothing is recorded from now on")

    def save(self, name: str) -> None:
        """``/save``."""
        if not name:
            raise UsageError("/save: name a file, such as /save talk.jsonl or /save talk.md")
        path = Path(name).expanduser()
        self.conversation.save(path)
        output.note(f"saved {len(self.conversation.messages)} messages to {path}")
