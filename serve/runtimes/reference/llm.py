"""The reference runtime's `LLM`: the same calls as `tensorrt_llm.LLM`, an engine process behind them.

The engine runs in a process of its own, as TensorRT-LLM's workers do, so that whoever holds the LLM (Triton's stub)
outlives it: when it dies, every open request ends with EngineDeadError, and so does every new one. A reader thread
hands out one report a step; waking asyncio consumers costs one call per event loop and step, not one per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import operator
import pickle
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from numbers import Integral
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.serve.runtimes.api import EngineDeadError, SamplingParams
from puzzle_trtllm.serve.runtimes.ending import read_end_ids
from puzzle_trtllm.serve.runtimes.reference.arguments import read_arguments
from puzzle_trtllm.serve.runtimes.reference.messages import Abort, DecodingRule, Ready, StepReport, Submit
from puzzle_trtllm.serve.runtimes.reference.processes import EngineProcesses
from puzzle_trtllm.serve.runtimes.reference.request import ReferenceRequestOutput, Waiter

Prompt: TypeAlias = "str | list[int] | Mapping[str, Any]"
_log = logging.getLogger(__name__)
_STOP_SECONDS = 5.0


class LLM:
    """`LLM(model, **llm_args)`; also a context manager. Raises EngineError when the engine cannot be loaded."""

    def __init__(self, model: str | Path, tokenizer: str | Path | None = None, **llm_args: Any) -> None:
        self.model = Path(model)
        self.args, ignored = read_arguments(model, llm_args)
        if ignored:
            _log.warning("without effect in the reference runtime: %s", ", ".join(sorted(ignored)))
        skip_tokenizer = bool(llm_args.get("skip_tokenizer_init"))
        self.tokenizer = None if skip_tokenizer else ChatTokenizer.from_folder(tokenizer or model)
        self._vocab_size = PuzzleArchitecture.from_path(self.model).vocab_size
        self._end_ids = frozenset(read_end_ids(self.model))
        self._ids = count(1)
        self._open: dict[int, ReferenceRequestOutput] = {}
        self._dead: str | None = None
        self._closing = False
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        self._processes = EngineProcesses(self.args.parallelism.tensor, self.args.cores)
        ready = self._load()
        self.facts, self._stats = ready.facts, ready.stats
        # Neither thread holds this object, so that one that is dropped without `shutdown` takes its engine along.
        weakref.finalize(self, self._messages.put, None)
        writer = threading.Thread(target=_write_messages, args=(self._messages, self._processes), daemon=True)
        self._reader = threading.Thread(target=_read_reports, args=(weakref.ref(self), self._processes), daemon=True)
        writer.start()
        self._reader.start()

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> Any:
        """Generate for one prompt (text or token ids; gives one output) or a list of them (a list), and wait.

        A list of prompts may come with a list of as many sampling_params.
        """
        prompts: Any = inputs
        several = isinstance(prompts, list) and not (prompts and isinstance(prompts[0], Integral))
        prompts = prompts if several else [prompts]
        own = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * len(prompts)
        if len(own) != len(prompts):
            raise ValueError(f"{len(own)} sampling_params for {len(prompts)} prompts")
        requests: list[ReferenceRequestOutput] = []
        try:
            for prompt, params in zip(prompts, own, strict=True):
                requests.append(self.generate_async(prompt, params))
            results = [request.result() for request in requests]
        except BaseException:
            for request in requests:
                request.abort()
            raise
        return results if several else results[0]

    def generate_async(
        self, inputs: Prompt, sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> ReferenceRequestOutput:
        """Start one request. Raises ValueError if the prompt cannot run, EngineDeadError if the engine is gone."""
        params = sampling_params or SamplingParams()
        if params.stop_strings and not (self.tokenizer and params.detokenize):
            raise ValueError("stop strings are found in the text, and this request gives none (detokenize, tokenizer)")
        prompt, token_ids = self._read_prompt(inputs)
        rule = self._resolve_rule(params, len(token_ids), streaming)
        request = ReferenceRequestOutput(
            request_id=next(self._ids),
            prompt=prompt,
            prompt_token_ids=token_ids,
            sampling_params=params,
            tokenizer=self.tokenizer.tokenizer if self.tokenizer else None,
            abort=self._abort,
        )
        self._open[request.request_id] = request
        self._send(
            Submit(
                request_id=request.request_id,
                prompt_token_ids=token_ids,
                rule=rule,
                arrival_ns=time.monotonic_ns(),
            )
        )
        if self._dead is not None:
            self._open.pop(request.request_id, None)
            raise EngineDeadError(self._dead)
        return request

    def get_stats(self, timeout: float | None = None) -> list[dict[str, Any]]:
        """The gauges after the last step, in TensorRT-LLM's form."""
        return [self._stats]

    # -- life and death ----------------------------------------------------------------------------------------------

    @property
    def engine_pid(self) -> int:
        """Process id of the engine, of its first rank if there are several."""
        return self._processes.pid

    def _check_health(self) -> bool:
        """False once the engine is dead (TensorRT-LLM's name for the question)."""
        return self._dead is None

    def shutdown(self) -> None:
        """Stop the engine; open requests end with EngineDeadError. Safe to call twice."""
        self._closing = True
        self._messages.put(None)
        self._processes.stop(_STOP_SECONDS)
        self._reader.join(_STOP_SECONDS)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _load(self) -> Ready:
        self._processes.send(pickle.dumps(self.args))
        try:
            ready: Ready = self._processes.receive()
        except EngineDeadError as error:
            self._processes.stop(0.0)
            raise EngineError(str(error)) from None
        return ready

    def _end(self, reason: str) -> None:
        self._dead = "the engine was shut down" if self._closing else f"the engine process died ({reason})"
        requests = list(self._open.values())
        self._open.clear()
        _wake(waiter for request in requests for waiter in request.put(EngineDeadError(self._dead)))

    def _take(self, report: StepReport) -> None:
        self._stats = report.stats
        waiters: list[Waiter] = []
        for update in report.updates:
            ended = update.finish_reason is not None or update.error is not None
            request = self._open.pop(update.request_id, None) if ended else self._open.get(update.request_id)
            if request is not None:
                waiters += request.put(update.error or update)
        _wake(waiters)

    def _abort(self, request_id: int) -> None:
        if request_id in self._open:
            self._send(Abort(request_id=request_id))

    def _send(self, message: Submit | Abort) -> None:
        self._messages.put(pickle.dumps(message))

    def _read_prompt(self, inputs: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(inputs, Mapping):
            given = inputs.get("prompt_token_ids")
            inputs = inputs.get("prompt") or "" if given is None else given
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise ValueError("a text prompt needs a tokenizer (skip_tokenizer_init is set)")
            prompt, token_ids = inputs, self.tokenizer.encode(inputs)
        else:
            prompt, token_ids = None, _plain_integers(inputs)
        if not token_ids:
            raise ValueError("the prompt is empty")
        if len(token_ids) >= self.args.max_seq_len:
            raise ValueError(f"the prompt has {len(token_ids)} tokens, max_seq_len is {self.args.max_seq_len}")
        if not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise ValueError(f"token ids must lie in 0..{self._vocab_size - 1}")
        return prompt, token_ids

    def _resolve_rule(self, params: SamplingParams, num_prompt_tokens: int, streaming: bool) -> DecodingRule:
        end_ids = self._end_ids if params.end_id is None else {params.end_id}
        vocabulary = range(self._vocab_size)  # -1 stands for no id
        says_nothing = (params.temperature, params.top_k, params.top_p) == (None, None, None)
        return DecodingRule(
            # As TensorRT-LLM: what does not fit behind the prompt is not generated.
            max_tokens=min(params.max_tokens, self.args.max_seq_len - num_prompt_tokens),
            greedy=says_nothing or params.temperature == 0 or params.top_k == 1,
            temperature=params.temperature or 1.0,
            top_k=params.top_k or 0,
            top_p=params.top_p or 1.0,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            end_ids=frozenset() if params.ignore_eos else frozenset(i for i in end_ids if i in vocabulary),
            stop_ids=frozenset(i for i in params.stop_token_ids or () if i in vocabulary),
            min_tokens=params.min_tokens or 0,
            frequency_penalty=params.frequency_penalty or 0.0,
            presence_penalty=params.presence_penalty or 0.0,
            repetition_penalty=params.repetition_penalty or 1.0,
            with_logprob=params.logprobs is not None,
            report_every=1 if params.stop_strings else self.args.stream_interval if streaming else 0,
        )


def _read_reports(front: weakref.ref[LLM], processes: EngineProcesses) -> None:
    try:
        while True:
            report = processes.receive()
            if llm := front():
                llm._take(report)
            del llm
    except EngineDeadError as error:
        reason = str(error)
    except Exception as error:  # a report that cannot be read is as good as none
        reason = f"the engine's report cannot be read: {error}"
    llm = front()
    if llm is not None:
        llm._end(reason)
    processes.stop(_STOP_SECONDS if llm is None or llm._closing else 0.0)


def _write_messages(messages: SimpleQueue[bytes | None], processes: EngineProcesses) -> None:
    """A thread of its own: the engine takes messages between steps, and callers must not wait for that."""
    while (message := messages.get()) is not None:
        processes.send(message)
    processes.send(pickle.dumps(None))


def _plain_integers(token_ids: Iterable[Any]) -> list[int]:
    try:
        return [operator.index(token) for token in token_ids]
    except TypeError:
        raise ValueError("token ids must be integers") from None


def _wake(waiters: Iterable[Waiter]) -> None:
    """Set events, with one wake-up per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for loop, event in waiters:
        by_loop.setdefault(loop, []).append(event)
    for loop, events in by_loop.items():
        with contextlib.suppress(RuntimeError):  # a loop that was closed has nobody waiting
            loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
