"""The answers in progress: all take their next token together, some leave while others enter."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightkv.engine.layers import Layers
from lightkv.engine.memory import Memory
from lightkv.engine.prefill import Prefilled
from lightkv.engine.request import Generated, Job, Result
from lightkv.engine.slots import Slots, slots
from lightkv.errors import out_of_memory

REGROW_STEPS = 256  # steps without running out of memory before twice as many rows are tried again


@dataclass(eq=False)
class _Row:
    """An answer in progress, on its row of the slots."""

    job: Job
    number: int
    position: int  # of the token that comes next
    tokens: list[int]
    begun: Generated
    draw: torch.Generator | None
    heard: set[int]  # tokens of its text and of what it has said, for the repetition penalty


class Flow:
    """The answers in progress, and those that wait for a row."""

    def __init__(self, layers: Layers, memory: Memory, axes: int, penalty: float, stops: frozenset[int]) -> None:
        """axes: of the model's positions. penalty: transformers' repetition penalty. stops: tokens that end answers."""
        self._layers, self._memory, self._axes, self._penalty, self._stops = layers, memory, axes, penalty, stops
        self._slots = self._no_slots()
        self._rows: list[_Row] = []
        self._ready: deque[tuple[_Row, Prefilled]] = deque()
        self._most = memory.answers
        self._fitted = 0  # steps since memory ran out on rows

    def _no_slots(self) -> Slots:
        return slots(len(self._layers), self._memory.bits)

    def busy(self) -> bool:
        return bool(self._rows or self._ready)

    @property
    def nbytes(self) -> int:
        """Of all caches of the answers."""
        return self._slots.nbytes + sum(prompt.nbytes for _, prompt in self._ready)

    @property
    def most(self) -> int:
        """Prompts that the engine may hold; fewer for a while after memory ran out on them."""
        return self._most

    def prompts(self) -> int:
        """How many are being answered, or wait for a row."""
        return len(self._rows) + len(self._ready)

    def alone(self) -> bool:
        """Whether a request is being answered that no other may be beside."""
        return any(row.job.request.alone for row in (*self._rows, *(row for row, _ in self._ready)))

    def enter(self, job: Job, prompts: Sequence[Prefilled]) -> Iterator[Result]:
        """Take over a request that is prefilled, or has failed."""
        request = job.request
        for number, prompt in enumerate(prompts):
            draw = None
            if request.temperature > 0:
                seed = request.seeds[number] if request.seeds is not None else 0
                draw = torch.Generator(device=prompt.first.device).manual_seed(seed)
            heard = job.heard | set(request.questions[number].tolist())
            row = _Row(job, number, prompt.position, [], self._begun(job, number, prompt), draw, heard)
            self._say([row], prompt.first[None])
            self._ready.append((row, prompt))
        yield from self._leave([row for row, _ in self._ready if row.job is job], job)

    def step(self) -> Iterator[Result]:
        """One more token of every answer. Where that fails, it is the result of all of their requests."""
        try:
            self._admit()
            began = time.perf_counter()
            self._say(self._rows, self._decode())
            self._fitted += 1
            if self._fitted % REGROW_STEPS == 0:
                self._most = min(self._memory.answers, 2 * self._most)
            each = (time.perf_counter() - began) / len(self._rows)
            for row in self._rows:
                row.job.generate_s += each
        except torch.AcceleratorError:
            raise
        except Exception as error:
            for row in self._rows:
                row.job.error = row.job.error or error
        yield from self._leave(self._rows)

    def _decode(self) -> Tensor:
        """Logits [B, V] of the rows' next tokens."""
        tokens = torch.tensor([[row.tokens[-1]] for row in self._rows])
        places = torch.tensor([row.position - 1 for row in self._rows])
        angles = self._layers.angles(places.expand(self._axes, -1))
        with self._layers.attached():
            hidden = self._layers.run(self._layers.embed(tokens), angles, range(len(self._layers)), self._slots.attend)
        return self._layers.logits(hidden[:, -1])

    def _admit(self) -> None:
        """Give rows to answers that wait; to fewer, for a while, where memory runs out on that."""
        while self._ready and len(self._rows) < self._most:
            fresh = [self._ready.popleft() for _ in range(min(len(self._ready), self._most - len(self._rows)))]
            last = len(self._rows) + len(fresh) == 1  # if this does not fit, nothing less will
            try:
                self._slots.admit([prompt for _, prompt in fresh], spend=last)
                self._rows += [row for row, _ in fresh]
                continue
            except Exception as error:
                if not out_of_memory(error) or last:
                    self._rows += [row for row, _ in fresh]
                    raise
            self._ready.extendleft(reversed(fresh))
            self._most, self._fitted = len(self._rows) or len(fresh) // 2, 0
            self._close_up(range(len(self._rows)))

    def _say(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Each row's next token, from logits [B, V]."""
        if self._penalty != 1.0:
            logits = torch.stack([self._penalised(row, one) for row, one in zip(rows, logits, strict=True)])
        best, greedy = (found.tolist() for found in logits.max(-1))
        for number, row in enumerate(rows):
            if not math.isfinite(best[number]):  # a maximum over what is no number is none
                row.job.error = FloatingPointError("the model's logits are not finite")
                continue
            token = greedy[number]
            if row.draw is not None:
                chances = (logits[number] / row.job.request.temperature).softmax(-1)
                token = int(torch.multinomial(chances, 1, generator=row.draw))
            row.tokens.append(token)
            row.heard.add(token)
            row.position += 1

    def _penalised(self, row: _Row, logits: Tensor) -> Tensor:
        """As transformers' repetition penalty: what was heard or said becomes less likely."""
        heard = torch.tensor(sorted(row.heard), device=logits.device)
        some, penalty = logits[heard], self._penalty
        return logits.index_copy(0, heard, torch.where(some > 0, some / penalty, some * penalty))

    def _leave(self, rows: Sequence[_Row], *jobs: Job) -> Iterator[Result]:
        """Take out those of `rows` whose answer has ended, and all of requests that have failed; what is complete."""
        ended = {id(row): row for row in rows if row.job.error is not None or self._ended(row)}
        for row in ended.values():
            if row.job.error is None:
                stopped = row.tokens[-1] in self._stops
                row.job.answers[row.number] = replace(row.begun, tokens=row.tokens, stopped=stopped)
        goes_on = [number for number, row in enumerate(self._rows) if id(row) not in ended]
        if len(goes_on) < len(self._rows):
            self._rows = [self._rows[number] for number in goes_on]
            self._close_up(goes_on)
        self._ready = deque(
            (row, prompt) for row, prompt in self._ready if id(row) not in ended and row.job.error is None
        )
        for job in {id(job): job for job in (*jobs, *(row.job for row in ended.values()))}.values():
            if job.error is not None or len(job.answers) == len(job.request.questions):
                yield job.result()

    def _close_up(self, rows: Sequence[int]) -> None:
        if rows:
            self._slots.keep(rows)
        else:
            self._slots = self._no_slots()

    def _ended(self, row: _Row) -> bool:
        return row.tokens[-1] in self._stops or len(row.tokens) >= row.job.request.max_new_tokens

    def _begun(self, job: Job, number: int, prompt: Prefilled) -> Generated:
        vision, text = job.vision_tokens, job.text_tokens + len(job.request.questions[number])
        k, v = prompt.tail[0]
        each = (k.nbytes + v.nbytes) // k.shape[1]
        held = sum(prompt.held) / (len(prompt.held) * vision) if vision else 1.0
        whole = (vision + text) * each * len(prompt.held)
        numbers, dims = 2 * k.shape[0] * k.shape[2], k.shape[2]  # of a token in a layer
        packed = sum(len(layer) for layer in prompt.kv) * self._memory.bits.per_number(dims)
        bits = numbers * (packed + 16.0 * k.shape[1] * len(prompt.kv))
        bits_whole = 16.0 * numbers * (vision + text) * len(prompt.kv)
        return Generated(
            [], False, vision + text, prompt.held[-1], held, prompt.nbytes, whole, bits, bits_whole, prompt.merges
        )
