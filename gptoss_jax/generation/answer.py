"""Replies to conversations. Letters: see `config`."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data import tokens as tokenizing
from ..data.conversation import Conversation
from ..data.harmony import CALL, RETURN, HarmonyText
from ..data.spellings import as_seen
from ..data.template import Template
from ..devices import hosts
from ..errors import DataError, TokenizerError
from ..files.paths import local_folder, read_json
from ..network.source import Source
from ..run.bar import bar
from ..run.options import Answering, Placing, Sampling
from . import choose
from .continuous import generate, prompts_of, watched
from .recording import Recording
from .steps import How


class Reply(NamedTuple):
    """What a model answers to one prompt."""

    token_ids: list[int]
    text: str
    """The text with harmony's marks."""
    parts: list[tuple[str, str]]
    """Channel and content of each message; empty where the model does not speak harmony."""
    ended: bool
    """Whether it ended by itself."""


class Answer:
    """Replies to some conversations, which grow while they are generated."""

    def __init__(
        self,
        source: Source,
        conversations: Sequence[Conversation | HarmonyText],
        answering: Answering,
        sampling: Sampling,
        placing: Placing,
        remarks: dict[str, None],
    ):
        """`conversations` may be harmony text, which ends where the model is to go on. `remarks` are what a user should
        know of how they were taken; more may come. TokenizerError or DataError where one cannot be written."""
        self.source, self.answering, self.sampling, self.placing = source, answering, sampling, placing
        self.remarks = remarks
        with local_folder(source.folder) as folder:
            self.tokenizer = tokenizing.load_tokenizer(folder)
            self.stop_ids = read_stop_ids(folder, self.tokenizer)
        written = [self._written(conversation, number) for number, conversation in enumerate(conversations, 1)]
        self.prompts = [tokenizing.token_ids(text, self.tokenizer, source.config.vocab_size) for text in written]
        self.asked = prompts_of(self.prompts, source.config, answering.max_new_tokens)
        self.token_ids: list[list[int]] = [[] for _ in conversations]
        self.recording: Recording | None = None
        """Takes whole replies with what their tokens chose, where that is asked for."""

    def _written(self, conversation: Conversation | HarmonyText, number: int) -> HarmonyText:
        if isinstance(conversation, HarmonyText):
            return conversation
        say, asked = self.remarks.setdefault, conversation
        if not self.answering.keep_reply:
            asked = conversation.without_reply()
        if len(asked.messages) < len(conversation.messages):
            say("the reply with which a conversation ends is left out (--keep-reply keeps it)")
        asked = as_seen(asked, generate=True, say=say)
        try:
            return Template(self.tokenizer).write(asked, self.answering.reasoning_effort, generate=True)
        except DataError as error:
            raise DataError(f"prompt {number}: {error}") from None

    @property
    def prompts_hash(self) -> str:
        """SHA-256 over the token ids of all prompts."""
        return hashlib.sha256(b"".join(prompt.tobytes() + b"\n" for prompt in self.prompts)).hexdigest()

    def grow(self) -> Iterator[None]:
        """Generate to the end; after each step the replies are longer. HostsError where other processes have other
        prompts."""
        hosts.agree({"the prompts' hash": self.prompts_hash})
        waiting, recording = self.asked, self.recording
        if recording is not None:
            waiting = recording.missing()
            for number, ids in recording.token_ids():
                self.token_ids[number] = ids
        if not waiting:
            return
        how = How(self.source.config, self.sampling, tuple(self.stop_ids), routing=recording is not None)
        # As many rows as for all: what runs beside a row decides how its last bits are rounded.
        decoder = choose.decoder(self.source, self.placing, self.asked, how)
        several = hosts.is_first() and len(self.asked) > 1  # a single reply may be watched itself
        try:
            with bar(len(self.asked), "replies", shown=several, done=len(self.asked) - len(waiting)) as advance:
                for grown in watched(generate(decoder, waiting), advance):
                    for growing in grown:
                        self.token_ids[growing.prompt.number] = growing.token_ids
                    if recording is not None:
                        recording.take(grown)
                    yield
        finally:
            if recording is not None:
                recording.save()

    def reply(self, number: int) -> Reply:
        """The reply to a conversation as it is now."""
        ids = self.token_ids[number]
        text = self.tokenizer.decode(ids)
        parts = [(part.channel, part.content) for part in tokenizing.messages_in_ids(ids, self.tokenizer)]
        return Reply(list(ids), text, parts, bool(ids) and ids[-1] in self.stop_ids)


def read_stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """The ids that end a reply: harmony's own, and those that generation_config.json lists; where there is none those
    of config.json, or the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        raw = read_json(file) if file.exists() else {}
        listed = raw.get("eos_token_id") if isinstance(raw, dict) else None
        if listed is not None:
            break
    else:
        listed = tokenizer.eos_token_id
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise TokenizerError(f"{file}: eos_token_id is {listed!r}, expected ids: copy the file of the original model")
    own = {token: number for number, token in ((n, str(t)) for n, t in tokenizer.added_tokens_decoder.items())}
    found = dict.fromkeys([*(own[mark] for mark in (RETURN, CALL) if mark in own), *ids])
    if not found:
        raise TokenizerError(
            f"{folder}: nothing says what ends a reply: copy generation_config.json of the original model"
        )
    return list(found)
