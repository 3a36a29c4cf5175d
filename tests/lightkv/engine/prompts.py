"""Samples of tests/lightkv/tiny.py as engine requests: the prompt in segments, the question separate."""

import torch

from lightkv import Engine, Request, Text, Vision, family_of
from tests.lightkv import reference

QUESTION = 3  # tokens at the end of a sample


def apart(model, sample, question=QUESTION):
    """(segments, question) of one prompt: its text, and its images and videos as encoded by the model."""
    ids = sample["input_ids"][0]
    embeds, _ = reference.prompt_of(model, sample)
    layout = family_of(model.config).layouts(model.config, sample["input_ids"], sample)[0]
    segments, begin, end = [], 0, len(ids) - question
    for item, count in zip(*torch.unique_consecutive(layout.item[:end], return_counts=True), strict=True):
        part = slice(begin, begin + int(count))
        grid = layout.grid[item].tolist() if item >= 0 else None
        segments.append(Text(ids[part]) if grid is None else Vision(embeds[0, part], tuple(grid)))
        begin = part.stop
    return segments, ids[end:]


def run(engine, *requests):
    """Results by key; raises the error of a failed request."""
    results = {}
    for result in engine.run(iter(requests)):
        if result.error is not None:
            raise result.error
        assert result.key not in results
        results[result.key] = result
    assert len(results) == len(requests)
    return results


def ask(model, config, segments, *questions, memory=None, **options):
    """The answers to questions about one prompt."""
    options = {"max_new_tokens": 6, **options}
    return run(Engine(model, config, memory), Request("only", segments, questions, **options))["only"].answers


def spoken(model, config, segments, question, memory=None, **options):
    """(tokens, logits [N, V] they were chosen from) of one answer."""
    engine, said = Engine(model, config, memory), []
    logits = engine.layers.logits
    engine.layers.logits = lambda hidden: said.append(logits(hidden)) or said[-1]
    options = {"max_new_tokens": 6, **options}
    result = run(engine, Request("only", segments, [question], **options))["only"]
    return result.answers[0].tokens, torch.cat([row.reshape(1, -1) for row in said])
