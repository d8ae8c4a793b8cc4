"""What Triton's model object owns: the LLM, its session, the senders, the metrics; started and stopped in order."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from puzzle_trtllm.serve.triton.backend import TritonEncoder, log_info, read_inputs, read_parameters
from puzzle_trtllm.serve.triton.host import start_llm
from puzzle_trtllm.serve.triton.instances import Instance
from puzzle_trtllm.serve.triton.metrics import MetricsThread
from puzzle_trtllm.serve.triton.notice import NoticeThread
from puzzle_trtllm.serve.triton.outbox import Outbox
from puzzle_trtllm.serve.triton.process import when_orphaned
from puzzle_trtllm.serve.triton.ranks import leave_job
from puzzle_trtllm.serve.triton.request import RequestLimits
from puzzle_trtllm.serve.triton.session import Session
from puzzle_trtllm.serve.triton.settings import ModelSettings

_SHUTDOWN_S = 5.0
"""For an engine whose server has gone."""


class Service:
    """One instance of the model."""

    def __init__(self, settings: ModelSettings, instance: Instance, folder: Path) -> None:
        """`folder` is the model's, where it hears that the server is about to stop."""
        triton = settings.triton
        self._llm: Any = None
        when_orphaned(self._end_without_server)
        self._llm, sampling_params = start_llm(settings, instance)
        self._outbox = Outbox(TritonEncoder(), log=log_info)
        self._session = Session(
            llm=self._llm,
            sampling_params=sampling_params,
            outbox=self._outbox,
            limits=RequestLimits(
                streaming_allowed=triton.decoupled,
                vocab_size=triton.vocab_size,
                max_seq_len=settings.llm_args.get("max_seq_len"),
            ),
            max_open_requests=triton.max_open_requests,
            sweep_period_s=triton.cancellation_check_period_ms / 1000,
            log=log_info,
        )
        self._metrics = MetricsThread(
            self._session,
            self._outbox,
            self._llm,
            metric_family=pb_utils.MetricFamily,
            step_timeout_s=triton.step_timeout_s,
            labels=instance.labels,
            log=log_info,
        )
        self._metrics.start()
        self._notice = NoticeThread(folder, os.getpid(), self._session.drain)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take the requests; responses go through their senders."""
        for request in requests:
            sender = request.get_response_sender()
            self._session.accept(request.request_id(), read_inputs(request), sender, read_parameters(request))

    def stop(self) -> None:
        """In the order in which nothing is asked of what is already gone."""
        self._notice.stop()
        self._metrics.stop()
        self._session.stop()
        self._outbox.close()
        self._llm.shutdown()
        leave_job()

    def _end_without_server(self) -> None:
        """A stub would wait for a server that was killed, for minutes or for ever, and the engine hold its memory."""
        threading.Timer(_SHUTDOWN_S, os._exit, args=(1,)).start()
        with contextlib.suppress(Exception):
            if self._llm is not None:
                self._llm.shutdown()
        os._exit(1)
