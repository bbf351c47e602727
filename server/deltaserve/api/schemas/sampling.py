"""Fields that completions and chat completions share, and their translation into ``SamplingParams``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from deltaserve.api.schemas.composition import Adapters
from deltaserve.api.schemas.ensemble import EnsembleChoice
from deltaserve.core import SamplingParams
from deltaserve.errors import InvalidRequest

MAX_N = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_TOKENS = 1 << 24
"""Beyond any context; the engine compares the sum of prompt and completion with the context it has."""
_INT64 = 1 << 63
_MODEL_CHARS = 512


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    """JSON keys are strings; a token id is written in plain decimal digits."""
    if not isinstance(value, Mapping):
        return value
    if len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} entries are allowed, found {len(value)}")
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in value):
        raise ValueError("keys must be token ids")
    biases = {int(key): bias for key, bias in value.items()}
    if len(biases) != len(value):
        raise ValueError("one token id is there twice")
    return biases


def _no_empty_stop(stops: list[str]) -> list[str]:
    if any(not stop for stop in stops):
        raise ValueError("a stop string must not be empty")
    return stops


Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False

    @model_validator(mode="before")
    @classmethod
    def _no_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class GenerationFields(Strict):
    """Ranges are OpenAI's where OpenAI has the field. ``top_k`` 0 and -1 are off."""

    model: Annotated[str, Field(min_length=1, max_length=_MODEL_CHARS)]
    adapters: Adapters = Field(default_factory=list)
    ensemble: EnsembleChoice | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_biases)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    stop: Annotated[
        list[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_stops), AfterValidator(_no_empty_stop)
    ] = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] = Field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _agree(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise InvalidRequest(
                "stream_options.include_obfuscation is not supported by this server",
                param="stream_options.include_obfuscation",
                code="unsupported_parameter",
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """What depends on the model (vocabulary, context) is checked by the engine."""
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(sorted(self.logit_bias.items())),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
