"""Pages on the loopback of this machine alone: a server that answers nobody who asks for it by another name."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from model.errors import ConfigError

HOST = "127.0.0.1"


class LocalServer(ThreadingHTTPServer):
    """The server; `port` 0 takes a free one. Raises `OSError` and `OverflowError` for a port that cannot be had."""

    daemon_threads = True

    def __init__(self, handler: type[LocalHandler], port: int = 0) -> None:
        super().__init__((HOST, port), handler)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


def serve_page(make: Callable[[int], LocalServer], port: int, what: str) -> None:
    """Run the server that `make` makes for --port until Ctrl-C; `what` says what it shows. Raises `ConfigError` for a bad port."""
    try:
        server = make(port)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not from 0 to 65535"
        raise ConfigError(f"--port {port}: {reason}; leave it out, and a free one is taken") from error
    print(f"{server.address} {what}: open it in a browser of this machine; Ctrl-C ends it", flush=True)
    with server:
        server.serve_forever()


class LocalHandler(BaseHTTPRequestHandler):
    """Answers with the headers of a page that loads nothing from elsewhere and stands in no other."""

    server: LocalServer
    protocol_version = "HTTP/1.1"
    policy = "default-src 'none'"

    def is_for_us(self) -> bool:
        """Tell whether the page is asked for by its own address, from its own address; if not, answer that.

        A page from elsewhere can reach this port under a name that it made lead here, but not under these.
        """
        port = self.server.server_address[1]
        names = (f"{HOST}:{port}", f"localhost:{port}")
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in names and origin in (None, *(f"http://{name}" for name in names)):
            return True
        self.answer(403, "text/plain", "this page is asked for by its own address alone\n")
        return False

    def answer(self, code: int, kind: str, text: str, policy: str = "") -> None:
        """Answer with a whole text, a document under `policy` where it has its own."""
        data = text.encode()
        more = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"} if policy else {}
        self.start_answer(code, kind, {"Content-Length": str(len(data)), **more})
        self.wfile.write(data)

    def start_answer(self, code: int, kind: str, more: dict[str, str]) -> None:
        """Send status and headers."""
        self.send_response(code)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Security-Policy": f"{self.policy}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for name, value in {**headers, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for a request."""
