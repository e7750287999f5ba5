"""From token ids to text that may be shown at once."""

from collections.abc import Sequence

from deepseek_jax.tokenizer import DecodeStream


class TextStream:
    """Cuts a stream of tokens at stop strings, and lets out only text that no stop string can still claim.

    The stop string that is complete first ends the text; of two that are complete with the same character, the
    longer one. What comes out is therefore the same however the text is split into tokens.

    Attributes:
      stopped: a stop string was found; the text is complete.
    """

    def __init__(self, stream: DecodeStream, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stream = stream
        self._stop = tuple(stop)
        self._held = ''

    def step(self, token_id: int) -> str:
        """The text that is certain after one more token; '' once `stopped`."""
        return self._release(self._stream.step(token_id))

    def flush(self) -> str:
        """The rest, when no more tokens follow: an unfinished stop string and the replacement of a cut character."""
        return self._release(self._stream.flush()) + self._take(len(self._held))

    def _release(self, text: str) -> str:
        if self.stopped:
            return ''
        self._held += text
        starts = [(self._held.find(stop), stop) for stop in self._stop]
        if found := [(start + len(stop), start) for start, stop in starts if start >= 0]:
            self.stopped = True
            _, start = min(found)
            kept, self._held = self._held[:start], ''
            return kept
        return self._take(len(self._held) - self._possible_stop())

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)
