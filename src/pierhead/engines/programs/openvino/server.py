"""The HTTP side: OpenAI's chat and completions, tokens, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from .answers import Shape, count, event, fault
from .asks import Ask, Refused, read
from .text import Words
from .wire import json_body, last, metrics, refused
from .work import Job, Worker


class Api:
    """Answers requests with one pipeline. ``genai`` is the module, ``context`` the most tokens of one request."""

    def __init__(self, genai: Any, pipeline: Any, model: str, context: int) -> None:
        self._genai = genai
        self._pipeline = pipeline
        self._tokenizer = pipeline.get_tokenizer()
        self._model = model
        self._context = context
        self._worker = Worker(pipeline)
        self._worker.start()

    def app(self) -> Starlette:
        """The routes."""
        posts = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        routes = [Route(path, call, methods=["POST"]) for path, call in posts.items()]
        routes += [Route("/health", self.health), Route("/metrics", self.metrics)]
        return Starlette(routes=routes, exception_handlers={Refused: refused})

    async def health(self, _: Request) -> Response:
        return PlainTextResponse("ok", 200 if self._worker.is_alive() else 503)

    async def metrics(self, _: Request) -> Response:
        worker = self._worker
        return metrics(
            {
                "openvino_requests_running gauge": worker.running,
                "openvino_requests_waiting gauge": worker.waiting,
                "openvino_cache_usage_ratio gauge": worker.cache_usage,
                "openvino_prompt_tokens_total counter": worker.prompt_tokens,
                "openvino_generated_tokens_total counter": worker.generated_tokens,
            }
        )

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def tokenize(self, request: Request) -> Response:
        body = await json_body(request)
        ask = read({**body, "max_tokens": 1}, chat="messages" in body)
        tokens = [int(t) for t in (await asyncio.to_thread(self._encode, ask)).data[0]]
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._context})

    async def detokenize(self, request: Request) -> Response:
        tokens: Any = (await json_body(request)).get("tokens")
        if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            raise Refused("'tokens' must be a list of whole numbers", "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(self._tokenizer.decode, tokens)})

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        body = await json_body(request)
        ask = read(body, chat)
        prompt = await asyncio.to_thread(self._encode, ask)
        size = int(prompt.shape[1])
        job = Job(prompt, self._config(ask, size), Words(self._tokenizer.decode, ask.stops))
        shape = Shape(str(body.get("model") or self._model), chat)
        self._worker.submit(job)
        if ask.stream:
            return StreamingResponse(self._stream(job, ask, shape, size, chat), media_type="text/event-stream")
        watch = asyncio.create_task(_left(request, job))
        try:
            parts: list[str] = []
            reason = "stop"
            async for kind, text in job.events():
                if kind == "end":
                    reason = text
                else:
                    parts.append(text)
        finally:
            job.gone = True
            watch.cancel()
        return JSONResponse(shape.whole("".join(parts), reason, count(size, job.count)))

    async def _stream(self, job: Job, ask: Ask, shape: Shape, size: int, chat: bool) -> AsyncIterator[bytes]:
        try:
            if chat:
                yield shape.chunk(None)
            async for kind, text in job.events():
                yield shape.chunk(text) if kind == "text" else shape.chunk(None, text)
            if ask.usage:
                yield shape.usage(count(size, job.count))
            yield b"data: [DONE]\n\n"
        except Refused as exc:
            yield event(fault(exc.message, exc.param, exc.status))
        finally:
            job.gone = True

    def _encode(self, ask: Ask) -> Any:
        """The prompt as a tensor of tokens."""
        text = ask.prompt
        if ask.messages:
            if not self._tokenizer.chat_template:
                raise Refused("this model has no chat template: ask it for completions", "messages")
            try:
                text = self._tokenizer.apply_chat_template(
                    ask.messages, add_generation_prompt=True, extra_context=ask.extra or None
                )
            except RuntimeError as exc:
                raise Refused(f"the chat template refuses these messages: {last(exc)}", "messages") from exc
        return self._tokenizer.encode(text, add_special_tokens=not ask.messages).input_ids

    def _config(self, ask: Ask, size: int) -> Any:
        """GenAI's settings of one answer; the model's own where the request says nothing."""
        if size >= self._context:
            raise Refused(
                f"This model's maximum context length is {self._context} tokens, and the prompt has {size}", "messages"
            )
        config = self._pipeline.get_config()
        for name, value in ask.sampling.items():
            setattr(config, name, value)
        room = self._context - size
        config.max_new_tokens = room if ask.tokens is None else max(1, min(ask.tokens, room))
        if ask.schema:
            config.structured_output_config = self._genai.StructuredOutputConfig(json_schema=ask.schema)
        try:
            config.validate()
        except RuntimeError as exc:
            raise Refused(f"OpenVINO GenAI refuses the settings of this request: {last(exc)}") from exc
        return config


async def _left(request: Request, job: Job) -> None:
    """Notice that a client is gone who waits for a whole answer."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.gone = True
        job.tell("end", "stop")
