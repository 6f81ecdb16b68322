"""Chooses the next token with transformers' own logits processors."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload.config import SamplingSettings
from offload.errors import ModelError


class Sampler:
    """Holds the processors and the random state of one answer.

    Settings that are None follow the checkpoint's generation_config. A flag such as ``--top-p`` asks for sampling, and
    so does the generation_config by ``do_sample``, or by a temperature or the like where it leaves ``do_sample`` out
    (as some published ones do); else the choice is greedy. Raises ModelError for a value of the generation_config that
    makes no sense.
    """

    def __init__(self, settings: SamplingSettings, defaults: GenerationConfig) -> None:
        def value(name: str, neutral: float) -> float:
            chosen = getattr(settings, name)
            if chosen is None:
                chosen = getattr(defaults, name, None)
            return neutral if chosen is None else chosen

        def asked(of: object) -> bool:
            return any(getattr(of, name, None) is not None for name in ("temperature", "top_k", "top_p", "min_p"))

        said = asked(defaults) if defaults.do_sample is None else defaults.do_sample
        sampled = bool(said) or asked(settings)
        temperature = value("temperature", 1.0)
        self.greedy = not sampled or temperature == 0
        self.seed = secrets.randbits(31) if settings.seed is None else settings.seed
        self._random = torch.Generator().manual_seed(self.seed)
        self._vocabulary = 0  # logits of the last choice
        self._noise: torch.Tensor | None = None  # for the next one
        self._processors = LogitsProcessorList()
        try:
            if (penalty := float(value("repetition_penalty", 1.0))) != 1.0:
                self._processors.append(RepetitionPenaltyLogitsProcessor(penalty))
            if self.greedy:
                return
            # the order of transformers' generate()
            if temperature != 1.0:
                self._processors.append(TemperatureLogitsWarper(float(temperature)))
            if (top_k := int(value("top_k", 0))) > 0:
                self._processors.append(TopKLogitsWarper(top_k))
            if (top_p := float(value("top_p", 1.0))) < 1.0:
                self._processors.append(TopPLogitsWarper(top_p))
            if (min_p := float(value("min_p", 0.0))) > 0.0:
                self._processors.append(MinPLogitsWarper(min_p))
        except (TypeError, ValueError) as error:  # settings are checked already
            raise ModelError(f"the checkpoint's generation_config.json: {error}; mend it or give the flag") from error

    def __call__(self, tokens: list[int], logits: torch.Tensor) -> int:
        """The next token after ``tokens``, given the last position's ``logits`` [V]. Advances the random state."""
        scores = logits.to("cpu", torch.float32, copy=True)[None]
        scores = self._processors(torch.tensor([tokens]), scores)
        if self.greedy:
            return int(scores.argmax(-1))
        self._vocabulary = scores.shape[1]
        self.prepare()
        noise, self._noise = self._noise, None
        likely = scores.softmax(-1)
        token = int((likely / noise).argmax(-1))  # what torch.multinomial does for one sample
        if not likely[0, token] > 0:
            raise RuntimeError("no token can be chosen: the logits hold inf or nan")
        return token

    def prepare(self) -> None:
        """Do of the next choice what does not depend on the logits, if their number is known. From any thread, one at
        a time.

        That is the noise of every entry, float32[1, V]: with 50,000 of them 1 of the 1.2 milliseconds of a choice.
        """
        if self._noise is None and self._vocabulary:
            self._noise = torch.empty(1, self._vocabulary).exponential_(1, generator=self._random)


def stop_ids(config: GenerationConfig, others: Iterable[int]) -> frozenset[int]:
    """Ids that end an answer: those of the checkpoint's generation config, and ``others`` (tokenizer, template)."""
    ids = config.eos_token_id
    return frozenset((*([ids] if isinstance(ids, int) else ids or ()), *others))
