"""The inference engine inside the training process. This is the only module that imports vllm.

vLLM seeds the global random generators, overwrites torchrun's variables, and destroys the trainer's process group
when an engine shuts down. This module prevents or reverts these side effects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.tokenizer import num_token_ids
from a2tgpo.data.weight_files import INDEX_FILE, weight_files
from a2tgpo.io.errors import ConfigError, first_line, require
from a2tgpo.rollout.cpu_reload import reload_weights
from a2tgpo.rollout.cpu_shared_memory import own_segments
from a2tgpo.rollout.engine_arguments import LOAD_FORMAT, ON_GPU, engine_arguments
from a2tgpo.rollout.engine_guest import (
    MAX_CACHE_HIT,
    abort_in_order,
    cap_cache_hits,
    environment_kept,
    inspect_here,
    keep_last_rows,
    leave_out_token_texts,
    preserved_host_state,
    return_experts_on_first_rank,
)
from a2tgpo.rollout.engine_limits import check_router_replay, explain_refusal, read_model
from a2tgpo.rollout.engine_output import (
    EngineOutput,
    ScoreOutput,
    expert_rows,
    generation_output,
    score_options,
    score_output,
)
from a2tgpo.rollout.lockstep import Lockstep, LockstepError
from a2tgpo.rollout.vllm_environment import prepare_environment
from a2tgpo.rollout.weight_names import checked_weights, checkpoint_shapes

prepare_environment()
with environment_kept():
    import vllm

import vllm.v1.engine.core  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402
from vllm import EngineArgs, ModelRegistry, SamplingParams  # noqa: E402
from vllm.device_allocator.cumem import CuMemAllocator  # noqa: E402
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed  # noqa: E402
from vllm.model_executor.model_loader import register_model_loader  # noqa: E402
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader  # noqa: E402
from vllm.outputs import RequestOutput  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.tokenizers.hf import get_cached_tokenizer  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor import interface as logits_processor_v2  # noqa: E402

# When an engine shuts down, vLLM would destroy the default process group, which the trainer owns.
_end_distributed = vllm.v1.engine.core.cleanup_dist_env_and_memory
vllm.v1.engine.core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None

PARTS = ("weights", "kv_cache")
"""vLLM's names for the parts of the engine's memory that `sleep` frees and `wake` allocates again."""
_NUM_TOKEN_IDS = "num_token_ids"


@register_model_loader(LOAD_FORMAT)
class WeightFilesLoader(DefaultModelLoader):
    """Read only the `weight_files` of a checkpoint. vLLM's own loader may also read other files of the folder."""

    def _prepare_weights(
        self, model_name_or_path: str, *_: Any, **__: Any
    ) -> tuple[str, list[str], bool, str]:
        files = [str(file) for file in weight_files(model_name_or_path).values()]
        return model_name_or_path, files, True, INDEX_FILE


class MaskUnusedIds(LogitsProcessorV1, logits_processor_v2.LogitsProcessor):
    """Never sample ids that the tokenizer does not use. These ids are at the end of the vocabulary.

    vLLM's own `allowed_token_ids` would need one list of all allowed ids per request. This class works with both
    model runners of vLLM.
    """

    def __init__(self, vllm_config: Any, *_: Any):
        self._num_token_ids = vllm_config.additional_config[_NUM_TOKEN_IDS]

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        logits[:, self._num_token_ids :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Do nothing, because all requests share one mask."""


class VllmEngine:
    """An engine, or this rank's part of an engine that several ranks share.

    All ranks of the world must construct their engines at the same point, because the construction creates process
    groups. All ranks must close the engines before the world is destroyed. The ranks of a shared engine must make the
    same calls in the same order. After an exception from `step`, the engine cannot be used again.

    Args:
        model_path: the model's Hugging Face folder, which contains the weights of version 0.
        model_dtype: the number format of the engine if `config.dtype` is `auto`.
        seed: seed of the engine's own generator. No request uses this generator.
        replica_group: CPU group of the engine's ranks, for `config.check_lockstep_every`. None: compare nothing.
        with_weights: whether to read weights. If it is False, `load_weights` must be called before the first step.
            With quantisation, weights are always read.
        tokenizer: the model's tokenizer, or None to load it.

    Raises:
        ConfigError: with a one-line message, if the model is missing or unsupported, or if the cache is too small for
            one sequence.
    """

    def __init__(
        self,
        model_path: str,
        *,
        config: RolloutConfig,
        model_dtype: str,
        max_model_len: int,
        seed: int,
        replica_group: dist.ProcessGroup | None = None,
        with_weights: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.max_model_len = max_model_len
        self.dtype = model_dtype if config.dtype == "auto" else config.dtype
        self.weight_version = 0
        self._failure: str | None = None  # the cause, if the engine has failed
        self._weights_fault: str | None = None if with_weights else "it was built without weights"
        self._asleep: set[str] = set()
        self._in_flight: set[str] = set()
        self._answers: dict[str, int] = {}  # id of each scoring request in flight -> number of answer tokens
        hf_config, tokenizer = read_model(model_path, tokenizer)
        self._expert_shape = check_router_replay(hf_config) if config.router_replay else None
        self._returns_experts = config.router_replay and (replica_group is None or replica_group.rank() == 0)
        self._experts_from: dict[str, int] = {}  # id of each generation in flight -> `experts_from`
        self.num_token_ids = num_token_ids(tokenizer)
        self.vocab_size: int = hf_config.vocab_size
        self._tied = bool(hf_config.tie_word_embeddings)
        self._shapes = checkpoint_shapes(model_path, tied=self._tied)
        self._owns_process_group = not dist.is_initialized()
        arguments = engine_arguments(
            model_path, hf_config, config, dtype=self.dtype, max_model_len=self.max_model_len, seed=seed
        )
        if not with_weights and config.quantization == "none":
            arguments["load_format"] = "dummy"
        if self.num_token_ids < self.vocab_size:
            arguments["logits_processors"] = [MaskUnusedIds]
            arguments["additional_config"] = {_NUM_TOKEN_IDS: self.num_token_ids}
        is_alone = ON_GPU or self._owns_process_group
        with (
            preserved_host_state(),
            contextlib.nullcontext() if is_alone else own_segments(_CPUSHMDistributed),
        ):
            inspect_here(ModelRegistry, hf_config.architectures or ())
            try:
                self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
            except ValueError as error:
                raise ConfigError(explain_refusal(error, max_model_len)) from error
        # vLLM looks for stop strings with a tokenizer. Replace vLLM's own tokenizer, because it may split texts
        # differently from the trainer's (data/tokenizer.py).
        self._engine.renderer.tokenizer = get_cached_tokenizer(tokenizer)  # type: ignore[arg-type]
        self._engine.output_processor.tokenizer = self._engine.renderer.tokenizer
        client: Any = self._engine.engine_core  # vLLM's client object for an engine that runs in this process
        core = client.engine_core
        cap_cache_hits(core.scheduler.kv_cache_manager)
        abort_in_order(core)
        if config.router_replay:
            return_experts_on_first_rank(core.scheduler, self._returns_experts)
        self._lockstep: Lockstep | None = None
        if replica_group is not None and config.check_lockstep_every:
            self._lockstep = Lockstep(core.scheduler, replica_group, every=config.check_lockstep_every)
        # vLLM uses its model runner V2 instead of V1 if Triton works, unless VLLM_USE_V2_MODEL_RUNNER says otherwise.
        self._has_second_runner: bool = self._engine.vllm_config.use_v2_model_runner

    @property
    def has_unfinished(self) -> bool:
        return self._engine.has_unfinished_requests()

    def submit(
        self,
        request_id: str,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        seed: int | None,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
        stop_tokens: Sequence[int] = (),
        top_logprobs: int = 0,
        experts_from: int = 0,
    ) -> None:
        """Queue a generation request. A later call of `step` returns its `EngineOutput`.

        Args:
            request_id: an id that no other request in flight has.
            seed: seed of the request's own random generator. It may be None only if the temperature is 0.
            temperature: temperature of sampling and log-probs. 0: greedy sampling, and log-probs at temperature 1.
            top_p: nucleus threshold. Log-probs are those of the distribution after truncation.
            stop: texts that end the generation. The output includes the text that ended it.
            stop_tokens: ids that end the generation, in addition to the end-of-sequence ids of the tokenizer and of
                generation_config.json. The output includes the id that ended the generation.
            top_logprobs: number of log-probs from which `EngineOutput.entropies` are estimated; 0: no entropies.
            experts_from: first position whose experts the output contains, if the engine returns experts.

        Raises:
            ConfigError: if the context leaves no room for one token.
        """
        self._add(
            request_id,
            list(tokens),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_tokens=max_tokens,
            stop=list(stop),
            stop_token_ids=list(stop_tokens),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            logprobs=top_logprobs,
            flat_logprobs=True,
            routed_experts_prompt_start=experts_from,
        )
        self._experts_from[request_id] = experts_from

    def submit_score(self, request_id: str, prefix: Sequence[int], answer: Sequence[int]) -> None:
        """Queue a request for log p(answer | prefix). A later call of `step` returns its `ScoreOutput`.

        Log-probs are those of the model itself, with temperature 1 and over the whole vocabulary. Prefix and answer
        together must leave room for one token, because vLLM always generates one.
        """
        assert prefix and answer, "scoring needs a prefix and an answer"
        # The last token of the prefix must be computed, because its row of logits scores the first answer token.
        self._submit_scoring(request_id, [*prefix, *answer], len(answer), len(prefix) - 1)

    def sequence_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Return the model's own log p of `tokens[1:]`, without using the cache. The engine must be idle."""
        assert not self.has_unfinished, "sequence_logprobs needs an idle engine"
        self._submit_scoring("sequence", list(tokens), len(tokens) - 1, 0)
        while not (outputs := self.step()):
            pass
        assert isinstance(outputs[0], ScoreOutput)
        return outputs[0].answer_logprobs

    def step(self) -> list[EngineOutput | ScoreOutput]:
        """Run one forward pass over the scheduled requests, and return the outputs of the finished requests.

        Raises:
            LockstepError: on all ranks of the engine, if their schedulers took different decisions.
            RuntimeError: if the engine failed.
        """
        self._check_usable()
        try:
            outputs = self._engine.step()
            if self._lockstep is not None:
                self._lockstep.compare()
        except LockstepError as error:
            self._failure = str(error)
            raise
        except Exception as error:
            self._failure = f"a step failed with {type(error).__name__}: {first_line(error):.300}"
            raise RuntimeError(f"the engine is lost: {self._failure}") from error
        return [self._finish(output) for output in outputs if output.finished]  # type: ignore[arg-type]

    def abort_all(self) -> None:
        """Drop all requests in flight. `step` returns no output for them."""
        self._engine.abort_request(sorted(self._in_flight))  # sorted, so that all ranks use the same order
        self._in_flight.clear()
        self._answers.clear()
        self._experts_from.clear()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Replace all weights. Any order is allowed, but the order of the layers needs the least memory.

        Args:
            weights: pairs (Hugging Face name, full tensor of any float type). They are consumed lazily.
            version: the new `weight_version`.

        Raises:
            RuntimeError: if names or shapes are not exactly the model's. The engine then needs a complete load.
        """
        assert not self.has_unfinished, "weights cannot be replaced while requests are in flight"
        assert "weights" not in self._asleep, "wake the weights before they are loaded"
        self._weights_fault = "its weights are incomplete: a refit did not finish"
        checked = checked_weights(weights, self._shapes, tied=self._tied)
        with torch.no_grad():
            rpc: Any = self._engine.collective_rpc
            rpc(reload_weights, args=(checked,))
        # The cached keys and values were computed with the old weights.
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the engine could not drop its prefix cache after a refit")
        self._weights_fault = None
        self.weight_version = version

    def sleep(self) -> None:
        """Free the memory of weights and KV cache. Before the next use, wake both; on a GPU, reload the weights."""
        assert not self.has_unfinished, "requests are in flight"
        assert not self._asleep, "the engine is asleep already"
        if ON_GPU:
            self._engine.sleep(level=2)
            self._weights_fault = "sleep() released its weights, and they were not loaded again"
        self._asleep = set(PARTS)

    @property
    def needs_weights(self) -> bool:
        """Whether `load_weights` must be called before the engine can generate."""
        return self._weights_fault is not None

    def is_on_card(self, part: str) -> bool:
        """Return whether `part` (`weights` or `kv_cache`) occupies memory."""
        assert part in PARTS, part
        if not ON_GPU:
            return part not in self._asleep
        taken = CuMemAllocator.get_instance().pointer_to_data.values()
        return any(data.tag == part and not data.is_asleep for data in taken)

    def wake(self, part: str) -> None:
        """Allocate the memory of `part` again.

        Wake and load the weights first, so that the trainer can free its own weights before the KV cache wakes.
        """
        assert part in PARTS, part
        if part not in self._asleep:
            return
        if ON_GPU:
            self._engine.wake_up(tags=[part])
        self._asleep.discard(part)

    def close(self) -> None:
        """Shut down the engine. Keep a process group that the trainer created."""
        self._engine.engine_core.shutdown()
        del self._engine
        if self._owns_process_group:
            _end_distributed()

    def _check_usable(self) -> None:
        assert not self._asleep, f"asleep in the engine: {' and '.join(sorted(self._asleep))}"
        fault = self._failure or self._weights_fault
        if fault is not None:
            raise RuntimeError(f"the engine cannot be used: {fault}")

    def _add(self, request_id: str, tokens: list[int], **params: Any) -> Any:
        """Queue a request with these parameters, and return vLLM's record of its output."""
        self._check_usable()
        require(
            len(tokens) < self.max_model_len,
            f"length of the context of {request_id}",
            len(tokens),
            f"< {self.max_model_len} (data.max_prompt_tokens + rollout.max_response_tokens); raise one of them",
        )
        # No other request has these parameters, so vLLM need not copy them.
        sampling = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True, **params)
        internal_id = self._engine.add_request(request_id, {"prompt_token_ids": tokens}, sampling)
        self._in_flight.add(request_id)
        record = self._engine.output_processor.request_states[internal_id]
        leave_out_token_texts(record)
        return record

    def _submit_scoring(self, request_id: str, tokens: list[int], num_scored: int, max_hit: int) -> None:
        record = self._add(
            request_id,
            tokens,
            temperature=0,
            max_tokens=1,
            # Rows of cached positions contain arbitrary values, which must not be decoded.
            detokenize=False,
            skip_reading_prefix_cache=False,
            extra_args={MAX_CACHE_HIT: max_hit},
            # If the engine returns experts, keep vLLM from copying those of the whole context.
            routed_experts_prompt_start=len(tokens),
            **score_options(tokens, num_scored, is_second_runner=self._has_second_runner),
        )
        keep_last_rows(record, num_scored)
        self._answers[request_id] = num_scored

    def _finish(self, output: RequestOutput) -> EngineOutput | ScoreOutput:
        self._in_flight.discard(output.request_id)
        num_scored = self._answers.pop(output.request_id, None)
        if num_scored is None:
            first, experts = self._experts_from.pop(output.request_id), b""
            if self._expert_shape is not None and self._returns_experts:
                experts = expert_rows(output, self._expert_shape, first=first)
            return generation_output(output, experts=experts)
        return score_output(output, num_scored, is_second_runner=self._has_second_runner)
