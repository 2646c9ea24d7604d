"""A small server process that speaks the completions protocol and vLLM's adapter loading, on a tiny model with PEFT.

Nothing of ours is imported: model, decoding and adapters are the libraries' own, one row at a time. `POST /misbehave`
with one of `MISCHIEF` makes it do what servers were seen to do. Prints its port when it listens.
"""

import argparse
import copy
import json
import sys
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

MISCHIEF = {
    "": "behaves",
    "stale-by-slot": "remembers replies under the place of an adapter in memory, which the next one takes over",
    "stale-keys": "remembers keys and values of a prompt in that way, and computes the last token with the new adapter",
    "stale-by-name": "remembers replies under the name of an adapter",
    "ignores-adapters": "answers without the adapter",
    "drops-a-choice": "leaves the last one out",
    "reverses": "sends the choices in the wrong order, each with its right number",
    "misnumbers": "gives every choice the same number",
    "fails": "answers 500",
    "hangs": "never answers",
    "hangs-up": "closes the connection",
    "truncates": "sends half of the JSON",
    "another-model": "falls back to the base model and says so",
    "adds-a-token": "puts a token of its own before a prompt",
    "tells-no-logprobs": "leaves them out",
    "tells-no-ids": "leaves the ids of a reply out",
    "counts-nothing": "leaves the usage out",
    "filters": "ends replies for a reason of its own",
    "loads-nothing": "has no route for adapters",
    "refuses-adapters": "answers 500 to every adapter",
    "sees-nothing": "does not find the folder of an adapter",
}


class Answer(NamedTuple):
    status: int
    document: Any


class Model:
    """One model with its adapters."""

    def __init__(self, folder: str) -> None:
        import peft
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder)
        none = peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(base, none, adapter_name="none").eval()
        self.slots: dict[str, int] = {}
        self.remembered: dict[Any, Any] = {}

    def load(self, name: str, path: str) -> None:
        self.model.load_adapter(path, adapter_name=name)
        self.slots[name] = min(set(range(1, len(self.slots) + 2)) - set(self.slots.values()))

    def unload(self, name: str) -> None:
        self.model.delete_adapter(name)
        del self.slots[name]

    def arm(self, name: str) -> Any:
        if name in self.slots:
            self.model.set_adapter(name)
            return nullcontext()
        return self.model.disable_adapter()

    def score(self, name: str, ids: list[int]) -> Any:
        """Log-probabilities (place, vocabulary) of what follows each token."""
        with self.torch.no_grad(), self.arm(name):
            return self.model(input_ids=self.torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def keys(self, name: str, ids: list[int]) -> Any:
        """Keys and values of all but the last token, as they were when this slot was first asked."""
        key = (self.slots.get(name, 0), tuple(ids))
        if key not in self.remembered:
            with self.torch.no_grad(), self.arm(name):
                out = self.model(input_ids=self.torch.tensor([ids[:-1]]), use_cache=True)
            self.remembered[key] = out.past_key_values
        return copy.deepcopy(self.remembered[key])

    def reply(
        self, name: str, ids: list[int], limit: int, stop: list[int], keys: Any = None, *, drawn: Any = None
    ) -> tuple[list[int], Any]:
        """New tokens, the one that ended it among them, and log-probabilities at each."""
        how: dict[str, Any] = {"do_sample": False}
        if drawn is not None:
            how = {"do_sample": True, "top_k": 0, "temperature": drawn["temperature"], "top_p": drawn["top_p"]}
            self.torch.manual_seed(drawn["seed"])
        with self.torch.no_grad(), self.arm(name):
            found = self.model.generate(
                input_ids=self.torch.tensor([ids]),
                attention_mask=self.torch.ones(1, len(ids), dtype=self.torch.long),
                max_new_tokens=limit, **how, eos_token_id=stop or None, pad_token_id=0,
                past_key_values=keys, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        log_probs = self.torch.stack(found.logits)[:, 0].float().log_softmax(-1)
        return found.sequences[0, len(ids) :].tolist(), log_probs


class Service:
    """The routes."""

    def __init__(self, model: Model, name: str) -> None:
        self.model = model
        self.name = name
        self.how = ""
        self.lock = threading.Lock()
        self.let_go = threading.Event()
        self.seen: list[str] = []  # names ever loaded
        self.keys: set[str] = set()  # what callers of the protocol were let in with

    def misbehave(self, body: dict[str, Any]) -> Answer:
        self.let_go.set()
        self.let_go = threading.Event()
        self.how = body["how"] if body["how"] in MISCHIEF else sys.exit(2)
        self.model.remembered.clear()
        return Answer(200, {"loaded": sorted(self.model.slots), "seen": self.seen, "keys": sorted(self.keys)})

    def models(self) -> Answer:
        names = [self.name, *self.model.slots]
        return Answer(200, {"object": "list", "data": [{"id": name, "owned_by": "contract"} for name in names]})

    def load(self, body: dict[str, Any]) -> Answer:
        name, path = body["lora_name"], Path(body["lora_path"])
        if self.how == "loads-nothing":
            return Answer(404, {"detail": "Not Found"})
        if name in self.model.slots:
            return Answer(400, {"error": {"message": "already loaded"}})
        if self.how == "sees-nothing" or not path.is_dir():
            return Answer(404, {"error": {"message": "no adapter there"}})
        if self.how == "refuses-adapters":
            return Answer(500, {"error": {"message": "engine says no"}})
        try:
            self.model.load(name, str(path))
        except Exception as error:  # noqa: BLE001 - whatever the engine says
            return Answer(500, {"error": {"message": str(error)}})
        self.seen.append(name)
        return Answer(200, f"Success: LoRA adapter '{name}' added successfully.")

    def unload(self, body: dict[str, Any]) -> Answer:
        if body["lora_name"] not in self.model.slots:
            return Answer(404, {"error": {"message": "cannot be found"}})
        self.model.unload(body["lora_name"])
        return Answer(200, "Success")

    def complete(self, body: dict[str, Any]) -> Answer:
        if self.how == "fails":
            return Answer(500, {"error": {"message": "engine died"}})
        name = body["model"]
        if name != self.name and name not in self.model.slots:
            return Answer(404, {"error": {"message": "no such model"}})
        asked = self.name if self.how in {"ignores-adapters", "another-model"} else name
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = [self.choice(asked, ids, body) | {"index": at} for at, ids in enumerate(prompts)]
        cost = sum(len(choice["token_ids"]) for choice in choices)
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": cost}
        if self.how == "drops-a-choice":
            choices.pop()
        if self.how == "reverses":
            choices.reverse()
        for choice in choices:
            if self.how == "misnumbers":
                choice["index"] = 0
            if self.how == "tells-no-ids":
                del choice["token_ids"]
            if self.how == "filters":
                choice["finish_reason"] = "content_filter"
        found = {"model": self.name if self.how == "another-model" else name, "choices": choices}
        return Answer(200, found if self.how == "counts-nothing" else found | {"usage": usage})

    def choice(self, name: str, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        if self.how == "adds-a-token":
            ids = [1, *ids]
        stop = [*body.get("stop_token_ids", []), self.model.tokenizer.eos_token_id]
        if body["temperature"] > 0:
            tokens, log_probs = self.model.reply(name, ids, body["max_tokens"], stop, drawn=body)
        else:
            tokens, log_probs = self.reply(name, ids, body["max_tokens"], stop)
        ended = bool(tokens) and tokens[-1] in stop
        shown = tokens[:-1] if ended else tokens
        found = {
            "text": self.model.tokenizer.decode(shown, skip_special_tokens=False),
            "finish_reason": "stop" if ended else "length",
            "token_ids": tokens,
            "logprobs": None,
        }
        if body.get("logprobs") is not None and self.how != "tells-no-logprobs":
            rows = list(zip(tokens, log_probs, strict=True))
            if body.get("echo"):
                scored = self.model.score(name, ids)
                rows = [(ids[0], None), *zip(ids[1:], scored[:-1], strict=True), *rows]
            found["logprobs"] = self.told(rows, body["logprobs"])
        return found

    def reply(self, name: str, ids: list[int], limit: int, stop: list[int]) -> tuple[list[int], Any]:
        if self.how == "stale-keys":
            return self.model.reply(name, ids, limit, stop, self.model.keys(name, ids))
        keys = {"stale-by-slot": self.model.slots.get(name, 0), "stale-by-name": name}
        if self.how not in keys:
            return self.model.reply(name, ids, limit, stop)
        key = (keys[self.how], tuple(ids), limit)
        if key not in self.model.remembered:
            self.model.remembered[key] = self.model.reply(name, ids, limit, stop)
        found: tuple[list[int], Any] = self.model.remembered[key]
        return found

    def told(self, rows: list[tuple[int, Any]], top: int) -> dict[str, Any]:
        def spelt(token: int) -> str:
            return str(self.model.tokenizer.decode([token]))

        def best(row: Any) -> dict[str, float] | None:
            if row is None:
                return None
            values, tokens = row.topk(top)
            return {spelt(token): value for token, value in zip(tokens.tolist(), values.tolist(), strict=True)}

        return {
            "tokens": [spelt(token) for token, _ in rows],
            "token_logprobs": [None if row is None else float(row[token]) for token, row in rows],
            "top_logprobs": [best(row) for _, row in rows],
        }


class Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.send(self.service.models())
        elif self.path == "/version":
            self.send(Answer(200, {"version": "1.2.3"}))
        elif self.path in {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}:
            self.send(Answer(404 if self.service.how == "loads-nothing" else 405, {}))
        else:
            self.send(Answer(404, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/misbehave":
            self.send(self.service.misbehave(body))
            return
        if self.path == "/v1/completions" and self.service.how == "hangs":
            self.service.let_go.wait()
        if self.path == "/v1/completions" and self.service.how in {"hangs", "hangs-up"}:
            self.close_connection = True
            return
        self.service.keys.add(self.headers.get("Authorization", ""))
        routes = {
            "/v1/completions": self.service.complete,
            "/v1/load_lora_adapter": self.service.load,
            "/v1/unload_lora_adapter": self.service.unload,
        }
        with self.service.lock:
            answer = routes[self.path](body) if self.path in routes else Answer(404, {})
        self.send(answer)

    def send(self, answer: Answer) -> None:
        words = isinstance(answer.document, str)
        data = (answer.document if words else json.dumps(answer.document)).encode()
        if self.service.how == "truncates" and self.path == "/v1/completions":
            data = data[: len(data) // 2]
        self.send_response(answer.status)
        self.send_header("Content-Type", "text/plain" if words else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("name")
    wish = parser.parse_args()
    Handler.service = Service(Model(wish.model), wish.name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
