"""A loopback server that speaks OpenAI's API.

It knows chat completions, embeddings, models, files, fine-tuning jobs and batches. It answers by a
rule, counts requests by content, and takes delays and faults as settings. As a program
(`python server.py DELAY`) it prints its address and serves until its input is closed. So a
benchmark's client has a process to itself.
"""

import asyncio
import collections
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable

from aiohttp import web


def reply_to(messages: list[dict], before: int = 0) -> str:
    """What a model might say to one of the notebooks' prompts.

    It depends on the prompt alone, or also on how often this was asked `before`.
    """
    text = messages[-1]["content"]
    asked = json.dumps([messages, before] if before else messages)
    number = int(hashlib.sha256(asked.encode()).hexdigest()[:8], 16)
    if "[[A]]" in messages[0]["content"]:
        return f"Because of {number}.\n\nFinal Verdict: [[{'ABC'[number % 3]}]]"
    if "## Generated Answer" in text and "## Context" in text:
        return f"{number % 11 / 10}\nBecause of {number}."
    if "## Generated Answer" in text:
        return f"{1 + number % 9 / 2}\nBecause of {number}."
    if "generate only questions" in text:
        return f"1. What is said of number {number}, and when?"
    return f"It is number {number}, said the answer in {1000 + number % 1000}, and that was that."


def answer(status: int, message: str, code: str | None = None, **headers: str) -> web.Response:
    """An error as OpenAI words it."""
    return web.json_response(
        {"error": {"message": message, "type": code or "error", "code": code}},
        status=status,
        headers=headers,
    )


class Server:
    """`with Server(...) as server:` serves on 127.0.0.1; `server.url` ends in /v1.

    Args:
        reply: of the messages; the text that the model says.
        delay: seconds before each chat completion.
        fault: of (request body, how often this content was asked before); None, a `web.Response` to
            send instead, "drop" to break the connection in the middle of the body, or a dict to
            change the choice (`content`, `finish_reason`, `refusal`) or the `body`'s fields.
        models: the ids that exist; by default any, and none is listed.
        job: the states that a fine-tuning job goes through, one a look; the last stays.
        batch: those of a batch.
        gate: of (method, path, how often that was asked before), before all else: None, a
            `web.Response` to send instead, or "lost" to do what is asked and then break the
            connection.
    """

    def __init__(
        self,
        reply: Callable = reply_to,
        delay: float = 0.0,
        fault: Callable | None = None,
        models: tuple = (),
        job: tuple = ("validating_files", "queued", "running", "succeeded"),
        batch: tuple = ("validating", "in_progress", "finalizing", "completed"),
        gate: Callable | None = None,
    ) -> None:
        self.reply, self.delay, self.fault, self.models, self.job, self.batch, self.gate = (
            reply,
            delay,
            fault,
            models,
            job,
            batch,
            gate,
        )
        self.asked: collections.Counter = collections.Counter()  # chat requests by content
        self.requests: list[tuple[str, str]] = []  # (method, path) of all
        self.headers: list[dict] = []
        self.bodies: list[dict] = []
        self.connections: set = set()
        self.most_at_once = self._now = 0
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, dict] = {}
        self.batches: dict[str, dict] = {}
        self.down_until = 0.0

    # The server's life

    def __enter__(self) -> "Server":
        self._loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start() -> None:
            app = web.Application(client_max_size=2**28, middlewares=[self._count])
            app.add_routes(
                [
                    web.post("/v1/chat/completions", self._chat),
                    web.post("/v1/embeddings", self._embeddings),
                    web.get("/v1/models", self._models),
                    web.get("/v1/models/{id:.+}", self._model),
                    web.get("/api/models/{id:.+}", self._model),  # Hugging Face's
                    web.post("/v1/files", self._upload),
                    web.get("/v1/files/{id}", self._file),
                    web.get("/v1/files/{id}/content", self._content),
                    web.post("/v1/fine_tuning/jobs", self._start_job),
                    web.get("/v1/fine_tuning/jobs", self._all_jobs),
                    web.get("/v1/fine_tuning/jobs/{id}", self._job),
                    web.post("/v1/batches", self._start_batch),
                    web.get("/v1/batches", self._all_batches),
                    web.get("/v1/batches/{id}", self._batch),
                ]
            )
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
            self._runner = runner
            ready.set()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        ready.wait(10)
        return self

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @web.middleware
    async def _count(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        self.headers.append(dict(request.headers))
        self.connections.add(request.transport)
        if time.monotonic() < self.down_until:
            request.transport.abort()
            return web.Response()
        fault = (
            self.gate(
                request.method,
                request.path,
                self.requests.count((request.method, request.path)) - 1,
            )
            if self.gate
            else None
        )
        if isinstance(fault, web.Response):
            return fault
        response = await handler(request)
        if fault == "lost":
            request.transport.abort()
        return response

    # Models

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        due = self._loop.time() + self.delay
        body = await request.json()
        self.bodies.append(body)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            content = hashlib.sha256(
                json.dumps([body["model"], body["messages"]]).encode()
            ).hexdigest()
            before, self.asked[content] = self.asked[content], self.asked[content] + 1
            fault = self.fault(body, before) if self.fault else None
            change = fault if isinstance(fault, dict) else {}
            completion = {**self._completion(body, change), **change.get("body", {})}
            await asyncio.sleep(
                due - self._loop.time()
            )  # what the server itself takes is part of the delay
            if isinstance(fault, web.Response):
                return fault
            if fault == "drop":
                response = web.StreamResponse(
                    headers={"Content-Type": "application/json", "Content-Length": "5000"}
                )
                await response.prepare(request)
                await response.write(json.dumps(completion).encode()[:40])
                request.transport.abort()
                return response
            return web.json_response(completion)
        finally:
            self._now -= 1

    def _completion(self, body: dict, change: dict) -> dict:
        text = (
            change.get("content", self.reply(body["messages"]))
            if "content" in change or not change.get("refusal")
            else None
        )
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": change.get("refusal")},
            "finish_reason": change.get("finish_reason", "stop"),
            "logprobs": None,
        }
        if body.get("logprobs"):
            first = [
                {"token": token, "logprob": p, "bytes": None}
                for token, p in (((text or "x").splitlines()[0], -0.4), ("40", -1.2))
            ]
            choice["logprobs"] = {
                "content": [{**first[0], "top_logprobs": first[: body.get("top_logprobs") or 1]}],
                "refusal": None,
            }
        usage = {
            "prompt_tokens": sum(len(m["content"]) for m in body["messages"]) // 4,
            "completion_tokens": len(text or "") // 4,
        }
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await request.json()
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = []
        for i, text in enumerate(texts):
            digest = hashlib.sha256(str(text).encode()).digest()
            data.append(
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": [byte / 255 - 0.5 for byte in digest],
                }
            )
        return web.json_response(
            {
                "object": "list",
                "data": data,
                "model": body["model"],
                "usage": {"prompt_tokens": 1, "total_tokens": 1},
            }
        )

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "object": "list",
                "data": [
                    {"id": id, "object": "model", "created": 1, "owned_by": "x"}
                    for id in self.models
                ],
            }
        )

    async def _model(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if self.models and id not in self.models:
            return answer(
                404,
                f"The model '{id}' does not exist or you do not have access to it.",
                "model_not_found",
            )
        return web.json_response({"id": id, "object": "model", "created": 1, "owned_by": "x"})

    # Files, jobs, batches

    async def _upload(self, request: web.Request) -> web.Response:
        content, purpose = b"", ""
        async for part in await request.multipart():
            if part.name == "file":
                content = await part.read()
            else:
                purpose = (await part.read()).decode()
        return web.json_response(self._keep(content, purpose))

    def _keep(self, content: bytes, purpose: str) -> dict:
        id = f"file-{len(self.files) + 1}"
        self.files[id] = content
        return {
            "id": id,
            "object": "file",
            "bytes": len(content),
            "created_at": 1,
            "filename": "x.jsonl",
            "purpose": purpose,
            "status": "processed",
        }

    async def _file(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        return web.json_response(
            {
                "id": id,
                "object": "file",
                "bytes": len(self.files[id]),
                "created_at": 1,
                "filename": "x.jsonl",
                "purpose": "batch",
                "status": "processed",
            }
        )

    async def _content(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["id"]])

    async def _start_job(self, request: web.Request) -> web.Response:
        body = await request.json()
        id = f"ftjob-{len(self.jobs) + 1}"
        self.jobs[id] = {**body, "looks": 0}
        return web.json_response(self._shown_job(id))

    async def _all_jobs(self, request: web.Request) -> web.Response:
        return _listed([self._shown_job(id) for id in reversed(self.jobs)])

    async def _job(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if id not in self.jobs:
            return answer(404, f"Could not find fine tune: {id}", "fine_tune_not_found")
        self.jobs[id]["looks"] += 1
        return web.json_response(self._shown_job(id))

    def _shown_job(self, id: str) -> dict:
        job = self.jobs[id]
        status = self.job[min(job["looks"], len(self.job) - 1)]
        failed = {
            "code": "invalid_training_file",
            "message": "Line 3 is too long.",
            "param": "training_file",
        }
        return {
            "id": id,
            "object": "fine_tuning.job",
            "created_at": 1,
            "model": job["model"],
            "status": status,
            "seed": job.get("seed") or 0,
            "fine_tuned_model": f"ft:{job['model']}:org:soft-{job.get('suffix') or 'name'}:{id}"
            if status == "succeeded"
            else None,
            "organization_id": "org",
            "training_file": job["training_file"],
            "validation_file": job.get("validation_file"),
            "hyperparameters": {"n_epochs": 3},
            "result_files": [],
            "finished_at": None,
            "trained_tokens": 3 * len(self.files[job["training_file"]]) // 4
            if status == "succeeded"
            else None,
            "error": failed if status == "failed" else None,
        }

    async def _start_batch(self, request: web.Request) -> web.Response:
        body = await request.json()
        id = f"batch_{len(self.batches) + 1}"
        self.batches[id] = {
            "input": body["input_file_id"],
            "looks": 0,
            "output": None,
            "error": None,
        }
        return web.json_response(self._shown_batch(id))

    async def _all_batches(self, request: web.Request) -> web.Response:
        return _listed([self._shown_batch(id) for id in reversed(self.batches)])

    async def _batch(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if id not in self.batches:
            return answer(404, f"No batch found with id '{id}'.")
        self.batches[id]["looks"] += 1
        return web.json_response(self._shown_batch(id))

    def _shown_batch(self, id: str) -> dict:
        batch = self.batches[id]
        status = self.batch[min(batch["looks"], len(self.batch) - 1)]
        lines = [json.loads(line) for line in self.files[batch["input"]].splitlines()]
        done = (
            lines[: len(lines) // 2]
            if status in ("expired", "cancelled")
            else lines
            if status == "completed"
            else []
        )
        if done and not batch["output"]:
            results: dict = {"output": [], "error": []}
            for number, line in enumerate(reversed(done)):  # a batch keeps no order
                self.asked[line["custom_id"]] += 1
                self.bodies.append(line["body"])
                fault = (
                    self.fault(line["body"], self.asked[line["custom_id"]] - 1)
                    if self.fault
                    else None
                )
                failed = isinstance(fault, web.Response)
                body = (
                    json.loads(fault.body)
                    if failed
                    else self._completion(line["body"], fault if isinstance(fault, dict) else {})
                )
                results["error" if failed else "output"].append(
                    {
                        "id": f"batch_req_{number}",
                        "custom_id": line["custom_id"],
                        "error": None,
                        "response": {
                            "status_code": fault.status if failed else 200,
                            "request_id": "q",
                            "body": body,
                        },
                    }
                )
            for kind, part in results.items():
                if part:
                    batch[kind] = self._keep(
                        "".join(json.dumps(result) + "\n" for result in part).encode(),
                        "batch_output",
                    )["id"]
        errors = {
            "object": "list",
            "data": [
                {
                    "code": "invalid_json",
                    "message": "This line is not JSON.",
                    "line": 3,
                    "param": None,
                }
            ],
        }
        return {
            "id": id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "errors": errors if status == "failed" else None,
            "input_file_id": batch["input"],
            "completion_window": "24h",
            "status": status,
            "output_file_id": batch["output"],
            "error_file_id": batch["error"],
            "created_at": 1,
            "request_counts": {"total": len(lines), "completed": len(done), "failed": 0},
        }


def _listed(data: list[dict]) -> web.Response:
    return web.json_response({"object": "list", "data": data, "has_more": False})


if __name__ == "__main__":
    with Server(delay=float(sys.argv[1])) as running:
        print(running.url, flush=True)
        sys.stdin.read()
