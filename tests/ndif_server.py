"""A server with NDIF's protocol, run as a script by test_nnsight.py in a subprocess.

    python ndif_server.py MODEL_DIRECTORY

It cannot import internal_policy, loads only classes of modules that NDIF allows, and runs what it gets as NDIF does:
deserialised against its own model, returning what the block saved. It prints its port, then one line of JSON for each
request: the bytes of the request and of the result, and the classes that the request loaded.
"""

import base64
import hashlib
import io
import json
import sys
import threading
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"internal_policy", "tiny", "tests", "benchmarks"}:
            raise ModuleNotFoundError(f"No module named {name!r} on the server", name=name)


sys.meta_path.insert(0, Blocked())

import torch  # noqa: E402
import zstandard  # noqa: E402
from nnsight import TransformersModel  # noqa: E402
from nnsight.intervention.envoy import Envoy  # noqa: E402
from nnsight.intervention.serialization import CustomCloudUnpickler  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402
from nnsight.tracing.tracer import _saves, dec, inc  # noqa: E402

torch.set_num_threads(1)
# What NDIF's server lets a request name, in whitelist.yaml of ndif-team/ndif, as far as it concerns us.
ALLOWED = {
    *("torch", "builtins", "collections", "functools", "_functools", "operator", "_operator", "math", "typing"),
    *("numpy", "dataclasses", "nnsight", "transformers", "cloudpickle", "copyreg", "pickle"),
}
model = None
connections = {}
requested_classes = set()


class Unpickler(CustomCloudUnpickler):
    def find_class(self, module, name):
        requested_classes.add(f"{module}:{name}")
        if module.split(".")[0] not in ALLOWED:
            raise PermissionError(f"{module} is not allowed on the server")
        return super().find_class(module, name)


def execute(request, blob):
    requested_classes.clear()
    model._remoteable_set_env(request.env)
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), request.compress, Unpickler)
    inc()
    try:
        tracer.execute(tracer.info.code)
        saves = _saves()
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in saves}
    finally:
        dec()
    result = io.BytesIO()
    torch.save(saved, result)
    return result.getvalue()


def frame(payload, opcode):
    size = len(payload)
    if size < 126:
        head = bytes([0x80 | opcode, size])
    elif size < 65536:
        head = bytes([0x80 | opcode, 126]) + size.to_bytes(2, "big")
    else:
        head = bytes([0x80 | opcode, 127]) + size.to_bytes(8, "big")
    return head + payload


def answer(connection, request, blob):
    try:
        result = execute(request, blob)
        line = {"request": len(blob), "result": len(result), "classes": sorted(requested_classes)}
        print(json.dumps(line), flush=True)
        if request.compress:
            result = zstandard.ZstdCompressor().compress(result)
        response = ResponseModel(id="1", status=Status.COMPLETED, data=result).pickle()
        connection.sendall(frame(response, 2))
    except Exception as error:
        text = f"Traceback (most recent call last):\n{type(error).__name__}: {error}"
        response = ResponseModel(id="1", status=Status.ERROR, description=text).model_dump_json()
        connection.sendall(frame(response.encode(), 1))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/hide-weights":
            hide_weights()
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        session = str(len(connections))
        connections[session] = self.connection
        self.connection.sendall(frame(json.dumps({"session_id": session}).encode(), 1))
        self.connection.recv(1024)  # the client closes the socket, and waits to see it closed here
        self.connection.sendall(frame(b"", 8))
        self.close_connection = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            p.get_param("name", header="content-disposition"): p.get_payload(decode=True)
            for p in BytesParser().parsebytes(head + body).get_payload()
        }
        request = RequestModel.model_validate_json(parts["data"])
        if self.headers.get("ndif-api-key") != "secret":
            status, text = 401, json.dumps({"detail": "Invalid API key"})
        else:
            status, text = 200, ResponseModel(id="1", status=Status.RECEIVED).model_dump_json()
            run = (connections[request.session_id], request, parts["blob"])
            threading.Thread(target=answer, args=run, daemon=True).start()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def hide_weights():
    """Act like a server that runs blocks in another process than the model: modules can be called, not read."""
    inherited = Envoy.__getattr__

    def without_weights(self, name):
        if name in {"weight", "bias"}:
            raise AttributeError(name)
        return inherited(self, name)

    Envoy.__getattr__ = without_weights


if __name__ == "__main__":
    model = TransformersModel(
        sys.argv[1], task="text-generation", dispatch=True, attn_implementation="eager", dtype=torch.float32
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
