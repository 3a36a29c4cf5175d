"""Batched decoding: one decode step per token for all answers in progress; rows enter and leave between steps."""

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

REGROW_STEPS = 256  # steps without running out of memory before the reduced number of rows is doubled


@dataclass(eq=False)
class _Row:
    """An answer in progress: a row of the decode batch."""

    job: Job
    number: int
    position: int  # of the next token
    tokens: list[int]
    figures: Generated  # without tokens yet
    draw: torch.Generator | None
    seen: set[int]  # token ids of the prompt, the question and the answer so far, for the repetition penalty


class DecodeBatch:
    """Decodes all answers in progress; prefilled prompts wait in `_ready` for a row."""

    def __init__(self, layers: Layers, memory: Memory, axes: int, penalty: float, stops: frozenset[int]) -> None:
        """axes: position axes of the model; penalty: transformers' repetition penalty; stops: stop token ids."""
        self._layers, self._memory, self._axes, self._penalty, self._stops = layers, memory, axes, penalty, stops
        self._slots = self._no_slots()
        self._rows: list[_Row] = []
        self._ready: deque[tuple[_Row, Prefilled]] = deque()
        self._most = memory.answers
        self._fitted = 0  # steps since memory ran out on admitting rows

    def _no_slots(self) -> Slots:
        return slots(len(self._layers), self._memory.bits)

    def busy(self) -> bool:
        return bool(self._rows or self._ready)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of all answers."""
        return self._slots.nbytes + sum(prompt.nbytes for _, prompt in self._ready)

    @property
    def most(self) -> int:
        """Most prompts that the engine may hold at present; for a while after memory ran out, fewer than configured."""
        return self._most

    def prompts(self) -> int:
        """Number of answers in progress or waiting for a row."""
        return len(self._rows) + len(self._ready)

    def alone(self) -> bool:
        """Whether an answer belongs to a request that must run alone."""
        return any(row.job.request.alone for row in (*self._rows, *(row for row, _ in self._ready)))

    def enter(self, job: Job, prompts: Sequence[Prefilled]) -> Iterator[Result]:
        """Add the prompts of a request after prefill, with their first tokens; yields results that are complete."""
        request = job.request
        for number, prompt in enumerate(prompts):
            draw = None
            if request.temperature > 0:
                seed = request.seeds[number] if request.seeds is not None else 0
                draw = torch.Generator(device=prompt.first.device).manual_seed(seed)
            seen = job.text_ids | set(request.questions[number].tolist())
            row = _Row(job, number, prompt.position, [], self._figures(job, number, prompt), draw, seen)
            self._append_tokens([row], prompt.first[None])
            self._ready.append((row, prompt))
        yield from self._leave([row for row, _ in self._ready if row.job is job], job)

    def step(self) -> Iterator[Result]:
        """Decode one token of every answer; a failure becomes the result of all their requests."""
        try:
            self._admit()
            began = time.perf_counter()
            self._append_tokens(self._rows, self._decode())
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
        """Give rows to waiting answers; where memory runs out, try fewer and lower the maximum for a while."""
        while self._ready and len(self._rows) < self._most:
            fresh = [self._ready.popleft() for _ in range(min(len(self._ready), self._most - len(self._rows)))]
            last = len(self._rows) + len(fresh) == 1  # a single row: nothing smaller can be tried
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

    def _append_tokens(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Choose each row's next token from logits [B, V]."""
        if self._penalty != 1.0:
            logits = torch.stack([self._penalised(row, one) for row, one in zip(rows, logits, strict=True)])
        best, greedy = (found.tolist() for found in logits.max(-1))
        for number, row in enumerate(rows):
            if not math.isfinite(best[number]):  # max over NaN is NaN
                row.job.error = FloatingPointError("the model's logits are not finite")
                continue
            token = greedy[number]
            if row.draw is not None:
                chances = (logits[number] / row.job.request.temperature).softmax(-1)
                token = int(torch.multinomial(chances, 1, generator=row.draw))
            row.tokens.append(token)
            row.seen.add(token)
            row.position += 1

    def _penalised(self, row: _Row, logits: Tensor) -> Tensor:
        """logits [V] with transformers' repetition penalty: tokens seen before become less likely."""
        seen = torch.tensor(sorted(row.seen), device=logits.device)
        some, penalty = logits[seen], self._penalty
        return logits.index_copy(0, seen, torch.where(some > 0, some / penalty, some * penalty))

    def _leave(self, rows: Sequence[_Row], *jobs: Job) -> Iterator[Result]:
        """Remove ended answers among `rows` and all rows of failed requests; yields results that are complete."""
        ended = {id(row): row for row in rows if row.job.error is not None or self._ended(row)}
        for row in ended.values():
            if row.job.error is None:
                stopped = row.tokens[-1] in self._stops
                row.job.answers[row.number] = replace(row.figures, tokens=row.tokens, stopped=stopped)
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

    def _figures(self, job: Job, number: int, prompt: Prefilled) -> Generated:
        """An answer without tokens: the size of its cache, compressed and uncompressed."""
        vision, text = job.vision_tokens, job.text_tokens + len(job.request.questions[number])
        k, v = prompt.tail[0]
        each = (k.nbytes + v.nbytes) // k.shape[1]
        held = sum(prompt.held) / (len(prompt.held) * vision) if vision else 1.0
        whole = (vision + text) * each * len(prompt.held)
        numbers, dims = 2 * k.shape[0] * k.shape[2], k.shape[2]  # numbers: per token and layer
        packed = sum(len(layer) for layer in prompt.kv) * self._memory.bits.per_number(dims)
        bits = numbers * (packed + 16.0 * k.shape[1] * len(prompt.kv))
        bits_whole = 16.0 * numbers * (vision + text) * len(prompt.kv)
        return Generated(
            [], False, vision + text, prompt.held[-1], held, prompt.nbytes, whole, bits, bits_whole, prompt.merges
        )
