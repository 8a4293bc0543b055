"""Servers that must be installed or built before they are measured: nodemailer's smtp-server, Haraka, go-smtp.

npm packages are installed, and the Go program is built, once into a cache folder of the user
(`$XDG_CACHE_HOME/penstock-bench`, or ~/.cache); delete it to get newer versions. go-smtp is built without network from
the sources of Debian's golang-github-emersion-go-smtp-dev and -go-sasl-dev. What cannot be built counts as not
installed. Each server accepts every message, keeps none, offers STARTTLS and logs next to nothing.

    python -m bench.other_servers [haraka ...]    # installs all or these, and prints which are available
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.measure import Peer, make_certificate
from bench.processes import ENVIRONMENT

_GO_SOURCES = Path("/usr/share/gocode")

_NODEMAILER = """
const {SMTPServer} = require('smtp-server');
const fs = require('fs');
const [port, cert, key] = process.argv.slice(2);
new SMTPServer({
    cert: fs.readFileSync(cert), key: fs.readFileSync(key),
    authOptional: true, disableReverseLookup: true, logger: false, socketTimeout: 3600e3,
    onData(stream, session, done) { stream.on('end', done); stream.resume(); },
}).listen({port: Number(port), host: '127.0.0.1', backlog: 4096});
"""

_HARAKA_ACCEPT = """
exports.hook_rcpt = function (next) { next(OK); };
exports.hook_queue = function (next) { next(OK); };
"""

_GO = """package main

import (
	"crypto/tls"
	"io"
	"io/ioutil"
	"log"
	"os"

	"github.com/emersion/go-smtp"
)

type sink struct{}

func (sink) Login(*smtp.ConnectionState, string, string) (smtp.Session, error) { return sink{}, nil }
func (sink) AnonymousLogin(*smtp.ConnectionState) (smtp.Session, error)        { return sink{}, nil }
func (sink) Reset()                                                            {}
func (sink) Logout() error                                                     { return nil }
func (sink) Mail(string, smtp.MailOptions) error                               { return nil }
func (sink) Rcpt(string) error                                                 { return nil }
func (sink) Data(r io.Reader) error {
	_, err := io.Copy(ioutil.Discard, r)
	return err
}

func main() {
	certificate, err := tls.LoadX509KeyPair(os.Args[2], os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	s := smtp.NewServer(sink{})
	s.Addr = os.Args[1]
	s.Domain = "localhost"
	s.AuthDisabled = true
	s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
	log.Fatal(s.ListenAndServe())
}
"""


def _cache(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock-bench" / name


_HARAKA: Final = _cache("haraka") / "node_modules" / "Haraka"


def _npm(folder: Path, package: str) -> bool:
    """Install a package with its dependencies, unless it is installed. Return whether it is installed now."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / package).is_dir() and shutil.which("npm") is not None:
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), package]
        subprocess.run(command, cwd=folder, timeout=300, check=False, capture_output=True)
    return (folder / "node_modules" / package / "package.json").is_file()


@functools.cache
def _has_nodemailer() -> bool:
    folder = _cache("nodemailer")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.js").write_text(_NODEMAILER)
    return _npm(folder, "smtp-server")


@functools.cache
def _has_haraka() -> bool:
    return _npm(_cache("haraka"), "Haraka")


@functools.cache
def _has_go_smtp() -> bool:
    folder = _cache("go-smtp")
    if not (_GO_SOURCES / "src/github.com/emersion/go-smtp").is_dir():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sink.go").write_text(_GO)
    environment = {
        **ENVIRONMENT, "GOPATH": str(_GO_SOURCES), "GO111MODULE": "off", "GOFLAGS": "", "GOPROXY": "off",
        "GOCACHE": str(folder / "cache"),
    }  # fmt: skip
    command = ["go", "build", "-o", "sink", "sink.go"]
    built = subprocess.run(command, cwd=folder, env=environment, timeout=300, check=False, capture_output=True)
    return built.returncode == 0


def _nodemailer(port: int, folder: Path) -> Sequence[str]:
    certificate, key = make_certificate(folder)
    return ["node", str(_cache("nodemailer") / "server.js"), str(port), str(certificate), str(key)]


def _haraka(port: int, folder: Path) -> Sequence[str]:
    return haraka(port, folder, plugins={"accept": _HARAKA_ACCEPT})


def haraka(
    port: int, folder: Path, *, plugins: Mapping[str, str], settings: Mapping[str, str] | None = None
) -> Sequence[str]:
    """Write the configuration of a Haraka that listens on a port and return the command that runs it.

    `plugins` are programs by name, in the order of their hooks; `settings` are further configuration files by name.
    """
    certificate, key = make_certificate(folder)
    config, programs = folder / "config", folder / "plugins"
    config.mkdir()
    programs.mkdir()
    shutil.copy(certificate, config / "tls_cert.pem")
    shutil.copy(key, config / "tls_key.pem")
    shutil.copy(_HARAKA / "config" / "connection.ini", config)  # without it, it does not start
    files = {
        "log.ini": "[main]\nlevel=CRIT\n",
        "smtp.ini": f"listen=127.0.0.1:{port}\nnodes=0\n",
        "plugins": "\n".join(("tls", *plugins, "")),
        "databytes": "0\n",
        "me": "localhost\n",
        "host_list": "localhost\n",
        "tls.ini": "[main]\nrequestCert=false\nrejectUnauthorized=false\n",
        **(settings or {}),
    }
    for name, text in files.items():
        (config / name).write_text(text)
    for name, text in plugins.items():
        (programs / f"{name}.js").write_text(text)
    return ["node", str(_HARAKA / "bin" / "haraka"), "-c", str(folder)]


def is_haraka_there() -> bool:
    """Return whether `python -m bench.other_servers` has installed Haraka."""
    return (_HARAKA / "package.json").is_file() and shutil.which("node") is not None


def _go_smtp(port: int, folder: Path) -> Sequence[str]:
    certificate, key = make_certificate(folder)
    return [str(_cache("go-smtp") / "sink"), f"127.0.0.1:{port}", str(certificate), str(key)]


NODEMAILER = Peer("nodemailer", _nodemailer, "node", _has_nodemailer)
HARAKA = Peer("haraka", _haraka, "node", _has_haraka, share=0.2)
GO_SMTP = Peer("go-smtp", _go_smtp, "go", _has_go_smtp)


if __name__ == "__main__":
    for peer in (NODEMAILER, HARAKA, GO_SMTP):
        if peer.name in sys.argv[1:] or len(sys.argv) == 1:
            print(f"{peer.name}: {'installed' if peer.is_installed else 'not installed'}")
