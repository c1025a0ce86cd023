"""A stand-in for DuckDuckGo that `ddgs` itself talks to: an HTTPS proxy that answers for it, with its page's markup."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "html.duckduckgo.com"

RESULT = (
    '<div class="result results_links results_links_deep web-result"><div class="links_main links_deep result__body">'
    '<h2 class="result__title"><a rel="nofollow" class="result__a" href="{url}">{title}</a></h2>'
    '<a class="result__snippet" href="{url}">{snippet}</a></div></div>'
)


def make_authority(folder: Path) -> tuple[Path, Path]:
    """Write a certificate authority, and a certificate of it for DuckDuckGo; return the files `ca.pem` and `site.pem`."""
    now = datetime.datetime.now(datetime.UTC)

    def name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    def certificate(
        subject: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, *, ca: bool
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("test authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, site = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_file, site_file = folder / "ca.pem", folder / "site.pem"
    ca_file.write_bytes(certificate("test authority", authority, authority, ca=True))
    private = site.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    site_file.write_bytes(private + certificate(HOST, site, authority, ca=False))
    return ca_file, site_file


class Site:
    """What DuckDuckGo would answer, and what it was asked."""

    def __init__(self) -> None:
        self.status = "200 OK"
        self.body = ""
        self.delay_s = 0.0
        self.queries: list[str] = []

    def results(self, *rows: tuple[str, str, str]) -> None:
        """Answer with a page of `(title, url, snippet)`."""
        found = "".join(RESULT.format(title=title, url=url, snippet=snippet) for title, url, snippet in rows)
        self.body = f"<!DOCTYPE html><html><body><div id='links' class='results'>{found}</div></body></html>"


@contextmanager
def serve_duckduckgo(site: Site, certificate: Path) -> Iterator[str]:
    """Answer for DuckDuckGo behind an HTTP proxy and give the proxy's URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(plain: socket.socket) -> None:
        with plain:
            head = _read_head(plain)
            if not head.startswith(f"CONNECT {HOST}:443"):
                plain.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                return
            plain.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    request = _read_head(secure)
                    length = next(
                        (
                            int(line.split(":")[1])
                            for line in request.lower().splitlines()
                            if line.startswith("content-length")
                        ),
                        0,
                    )
                    form = b""
                    while len(form) < length:
                        form += secure.recv(4096)
                    site.queries.append(parse_qs(form.decode())["q"][0])
                    time.sleep(site.delay_s)
                    body = site.body.encode()
                    header = f"HTTP/1.1 {site.status}\r\nContent-Type: text/html; charset=UTF-8\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                    secure.sendall(header.encode() + body)
            except (ssl.SSLError, OSError):
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=5)


def _read_head(connection: socket.socket) -> str:
    """Return the request line and headers."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = connection.recv(1)
        if not piece:
            break
        head += piece
    return head.decode("latin-1")
