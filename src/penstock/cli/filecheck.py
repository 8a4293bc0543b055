"""The files and limits that a configuration depends on: what would stop the service, and what will hurt it later."""

from __future__ import annotations

import datetime
import os
import re
import resource
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from penstock.auth.users import UsersFile
from penstock.config import ListenerSettings, Settings
from penstock.delivery.custom import load_delivery
from penstock.journal import Journal, JournalSettings
from penstock.metrics.settings import ControlSettings
from penstock.net.listen import ListenAddress
from penstock.net.natswire import read_nkey
from penstock.net.tls import TlsSettings, client_context, server_context
from penstock.operations.endpoint import read_token
from penstock.policy.files import files_of
from penstock.policy.hooks import load_hook
from penstock.policy.recipients import FileRecipients
from penstock.privileges import find_account

_RENEW_BEFORE: Final = datetime.timedelta(days=14)
_OTHER_DESCRIPTORS: Final = 200
"""Descriptors for files, the spool, DNS and the journal."""

_LONGEST_SOCKET_PATH: Final = 107

_KEY_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)


class _FileError(ValueError):
    """A file cannot be used. The text begins with the key that names it."""


def cause_of(exc: Exception, settings: Settings, *, reads_keys: bool = True) -> str:
    """Return why a start has failed, with the key of the file that cannot be used, if it is one.

    Most errors of the system and of libraries name neither. Without `reads_keys` the private keys of listeners are not
    read: a worker process has them from the supervisor, and need not be allowed to.
    """
    found = tls_problems(settings) if reads_keys else []
    found += _failures(_read_at_start(settings, Path(settings.data_dir).absolute()))
    return found[0] if found else str(exc)


def problems(settings: Settings, *, loads_code: bool = True) -> list[str]:
    """Return what would stop or break the service, each with its key: missing, unreadable or unusable files.

    Loads the policies and the delivery if `loads_code`. Never prompts for a passphrase.
    """
    found = tls_problems(settings)
    if settings.server.user:
        try:
            find_account(settings.server.user, settings.server.group)
        except ValueError as exc:
            found.append(str(exc))
    folder = Path(settings.data_dir).absolute()
    found += _failures(_uses(settings, folder))
    return found + _failures(_code(settings)) if loads_code else found


def _failures(uses: Iterator[tuple[str, Callable[[], object]]]) -> list[str]:
    """Return what cannot be used, and why, each with its key."""
    found: list[str] = []
    for key, use in uses:
        try:
            use()
        except OSError as exc:
            name = "" if exc.filename is None else f"{os.fsdecode(exc.filename)}: "
            found.append(f"{key}: {name}{_reason(exc)}")
        except ValueError as exc:
            found.append(f"{key}: {exc}")
        except SystemExit as exc:
            found.append(f"{key}: it has ended the program with code {exc.code} when it was loaded")
    return found


def _uses(settings: Settings, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the keys that name files, and a function that uses them as the server does."""
    yield from _places(settings, folder)
    trusted = {"relay": settings.relay.tls.ca_file}
    trusted |= {f"route[{number}]": route.tls.ca_file for number, route in enumerate(settings.route)}
    for place in filter(trusted.get, trusted):
        yield f"{place}.tls.ca_file", partial(_check_ca_file, folder / trusted[place])
    if settings.metrics.token_file:
        yield "metrics.token_file", partial(read_token, folder / settings.metrics.token_file)
    yield from _read_at_start(settings, folder)


def _read_at_start(settings: Settings, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the keys of files without which the server does not start, but for those of TLS."""
    for number, route in enumerate(settings.route):
        if route.auth is not None:
            yield f"route[{number}].auth.password_file", (folder / route.auth.password_file).read_bytes
    for number, listener in enumerate(settings.listener):
        if listener.auth is not None:
            yield f"listener[{number}].auth.users", UsersFile(folder / listener.auth.users).names
    yield from _cluster_files(settings, folder)
    if settings.recipients.file:
        silent = Journal(JournalSettings(events="none"))
        yield "recipients.file", partial(FileRecipients, folder / settings.recipients.file, bool, silent)
    yield from files_of(settings.policy, folder)


def _code(settings: Settings) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the keys that name Python code, and a function that loads it."""
    if ":" in settings.delivery.kind:
        yield "delivery.kind", partial(load_delivery, settings.delivery.kind, settings.delivery.arguments)
    for number, hook in enumerate(settings.check):
        yield f"check[{number}].hook", partial(load_hook, hook.hook, hook.arguments)


def _cluster_files(settings: Settings, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    cluster = settings.jetstream
    if settings.delivery.kind != "jetstream":
        return
    if cluster.password_file:
        yield "jetstream.password_file", (folder / cluster.password_file).read_text
    if cluster.nkey_file:
        yield "jetstream.nkey_file", partial(read_nkey, folder / cluster.nkey_file)
    if cluster.tls.ca_file:
        yield "jetstream.tls.ca_file", partial(_check_ca_file, folder / cluster.tls.ca_file)
    for key in ("certificate", "key"):
        if getattr(cluster.tls, key):
            yield f"jetstream.tls.{key}", (folder / getattr(cluster.tls, key)).read_bytes


def _places(settings: Settings, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the keys that say where the server writes, and a function that checks that it can."""
    yield "data_dir", partial(_check_own_folder, folder)
    if settings.delivery.has_relay:
        yield "spool.path", partial(_check_own_folder, folder / settings.spool.path)
    if settings.journal.file:
        yield "journal.file", partial(_check_log, folder / settings.journal.file, folder)
    if settings.control.socket and settings.control != ControlSettings():
        yield "control.socket", partial(_check_socket_path, folder / settings.control.socket)
    for number, listener in enumerate(settings.listener):
        if path := ListenAddress.parse(listener.address).path:
            yield f"listener[{number}].address", partial(_check_socket, Path(path), folder)
    for number, trace in enumerate(settings.trace):
        yield f"trace[{number}].file", partial(_check_folder, (folder / trace.file).parent, folder)


def _check_socket_path(path: Path) -> None:
    """Raise ValueError for a path that is too long for a unix socket (unix(7))."""
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise ValueError(f"{path} is longer than {_LONGEST_SOCKET_PATH} octets, the most for a unix socket")


def _check_socket(path: Path, data_dir: Path) -> None:
    """Raise ValueError or OSError for a path at which no unix socket can be bound."""
    _check_socket_path(path)
    _check_folder(path.parent, data_dir)


def _check_own_folder(folder: Path) -> None:
    """Raise OSError for the place of a directory that the server makes, where something else is."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is not a directory")


def _check_log(file: Path, data_dir: Path) -> None:
    """Raise OSError for a file that cannot be written."""
    _check_folder(file.parent, data_dir)
    if file.is_dir():
        raise OSError(f"{file} is a directory")


def _check_folder(folder: Path, data_dir: Path) -> None:
    """Raise OSError for a folder that does not exist. The server makes its state directory."""
    if folder != data_dir and not folder.is_dir():
        raise OSError(f"{folder}: no such directory")


def _check_ca_file(file: Path) -> None:
    """Raise ValueError, which names the file, if it has no certificates."""
    try:
        client_context(verify=True, ca_file=str(file))
    except OSError as exc:
        raise ValueError(f"{file}: {_reason(exc)}") from exc


def warnings(settings: Settings, *, reads_files: bool = True) -> list[str]:
    """Return what will hurt later, each with its key. Files that cannot be used are left to `problems`."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.admission.connections + settings.relay.pool.connections + _OTHER_DESCRIPTORS
    found = []
    if limit != resource.RLIM_INFINITY and limit < needed:
        found.append(
            f"admission.connections: {settings.admission.connections} connections need {needed} descriptors, and the "
            f"limit of this process is {limit}; raise it (ulimit -n, systemd LimitNOFILE=) or lower the key"
        )
    if settings.control == ControlSettings():  # the server starts without it
        try:
            _check_socket_path(Path(settings.data_dir).absolute() / settings.control.socket)
        except ValueError as exc:
            found.append(f"control.socket: {exc}; penstock status, top and ctl cannot be used")
    if reads_files:
        for number, listener in enumerate(settings.listener):
            found += [f"listener[{number}].{text}" for text in _listener_warnings(listener, settings)]
    return found


def _listener_warnings(listener: ListenerSettings, settings: Settings) -> Iterator[str]:
    folder = Path(settings.data_dir).absolute()
    if listener.auth is not None and listener.auth.required:
        file = folder / listener.auth.users
        try:
            if not UsersFile(file).names():
                yield f"auth.users: {file} has no users, so no client can send mail; add one: penstock user add NAME"
        except (OSError, ValueError):
            pass
    if listener.tls.mode == "none" or not listener.tls.certificate:
        return
    try:
        leaf = _certificate(folder / listener.tls.certificate)
    except _FileError:
        return
    ends = leaf.not_valid_after_utc
    if ends - datetime.datetime.now(datetime.UTC) < _RENEW_BEFORE:
        yield f"tls.certificate: {folder / listener.tls.certificate} expires on {ends:%Y-%m-%d}"
    if not _names_host(leaf, settings.own_hostname):
        yield f"tls.certificate: {folder / listener.tls.certificate} does not name the host {settings.own_hostname}"


# ---- TLS


def tls_problems(settings: Settings) -> list[str]:
    """Return what makes the certificates and keys of listeners unusable, each with its key."""
    folder = Path(settings.data_dir).absolute()
    found = []
    for number, listener in enumerate(settings.listener):
        if listener.tls.mode != "none" and listener.tls.certificate:
            try:
                _check_pair(listener.tls, folder)
            except _FileError as exc:
                found.append(f"listener[{number}].{exc}")
    return found


def _check_pair(tls: TlsSettings, folder: Path) -> None:
    """Check a certificate and its key. Raise _FileError."""
    certificate = folder / tls.certificate
    leaf = _certificate(certificate)
    now = datetime.datetime.now(datetime.UTC)
    if leaf.not_valid_after_utc < now:
        raise _FileError(f"tls.certificate: {certificate} expired on {leaf.not_valid_after_utc:%Y-%m-%d}")
    if leaf.not_valid_before_utc > now:
        raise _FileError(f"tls.certificate: {certificate} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d}")
    name, file = ("tls.key", folder / tls.key) if tls.key else ("tls.certificate", certificate)
    key = _private_key(name, file)
    if _public(leaf) != key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
        raise _FileError(f"{name}: {file} is not the private key of the first certificate in {certificate}")
    try:
        server_context(tls, certificate, folder / tls.key if tls.key else None)
    except ssl.SSLError as exc:
        raise _FileError(f"tls.certificate: OpenSSL refuses {certificate}: {_reason(exc)}") from exc


def _certificate(file: Path) -> x509.Certificate:
    """Return the first certificate of a file. Raise _FileError."""
    data = _read("tls.certificate", file)
    try:
        return x509.load_pem_x509_certificates(data)[0]
    except ValueError as exc:
        raise _FileError(f"tls.certificate: {file} has no PEM certificate") from exc


def _private_key(name: str, file: Path) -> PrivateKeyTypes:
    """Return the private key of a file. Raise _FileError, also for a key with a passphrase."""
    found = _KEY_BLOCK.search(_read(name, file))
    if found is None:
        where = ", and tls.key is not set" if name == "tls.certificate" else ""
        raise _FileError(f"{name}: {file} has no PEM private key{where}")
    try:
        return load_pem_private_key(found[0], password=None)
    except TypeError as exc:
        raise _FileError(
            f"{name}: the private key in {file} is encrypted; decrypt it, for example with openssl pkey -in FILE"
        ) from exc
    except ValueError as exc:
        raise _FileError(f"{name}: the private key in {file} cannot be read: {exc}") from exc


def _public(leaf: x509.Certificate) -> bytes:
    return leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _names_host(leaf: x509.Certificate, host: str) -> bool:
    """Return True if a certificate is for a host, by a wildcard for its first label or literally (RFC 6125 6.4)."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    host = host.lower()
    wildcard = f"*.{host.partition('.')[2]}"
    return any(name.lower() in (host, wildcard) for name in names.get_values_for_type(x509.DNSName))


# ---- files


def _read(key: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as exc:
        raise _FileError(f"{key}: {file}: {_reason(exc)}") from exc


def _reason(exc: OSError) -> str:
    """Return the reason of an error without the name of the file, which may be that of another."""
    return exc.strerror or str(exc)
