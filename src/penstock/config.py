"""TOML to settings. Errors name the key; nothing is guessed, nothing is ignored.

The settings of a part are a small frozen class beside the part; here they are joined to the shape of the file, read,
cross-checked, described. No part imports this module.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import tomli_w

from penstock import schema
from penstock.addresses import canonical_domain, domain_of, parse_network
from penstock.auth.base import AuthSettings
from penstock.delivery.maildir import MaildirSettings
from penstock.delivery.passthrough import PassthroughSettings
from penstock.journal import JournalSettings
from penstock.net.listen import ListenAddress, find_group, parse_mode
from penstock.net.resolver import ResolverSettings, parse_server
from penstock.net.tls import TlsSettings
from penstock.policy.hooks import HookSettings
from penstock.policy.recipients import RecipientSettings
from penstock.relay.route import RouteSettings, check_routes
from penstock.relay.scheduler import RelaySettings
from penstock.schema import SchemaError
from penstock.server.body import BodySettings
from penstock.server.limits import AdmissionSettings, LimitSettings
from penstock.server.listener import WireSettings
from penstock.smtp.extensions import ExtensionSettings
from penstock.spool.spool import SpoolSettings

Struct = msgspec.Struct
Meta = msgspec.Meta


class ConfigError(ValueError):
    """What is wrong with a configuration; the text names the key and the right form."""


class ListenerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where clients come in, and what they are offered there."""

    address: Annotated[
        str, Meta(description="127.0.0.1:2525, [::1]:2525, :25 (every address) or unix:/run/penstock/lmtp")
    ] = "127.0.0.1:2525"
    name: Annotated[str, Meta(description="What the journal calls it; the address when empty")] = ""
    kind: Annotated[Literal["smtp", "lmtp"], Meta(description="SMTP (RFC 5321) or LMTP (RFC 2033)")] = "smtp"
    max_size: Annotated[int, Meta(ge=0, description="SIZE: octets a message may have (RFC 1870); 0 is no limit")] = (
        26_214_400
    )
    max_hops: Annotated[
        int,
        Meta(ge=0, le=1000, description="Received fields before a message counts as looping; 0 does not look"),
    ] = 50
    proxy_networks: Annotated[
        tuple[str, ...],
        Meta(description="Networks whose clients must begin with a PROXY header, version 1 or 2"),
    ] = ()
    relay_networks: Annotated[tuple[str, ...], Meta(description="Networks whose clients may send to any domain")] = ()
    addresses: Annotated[
        Literal["tolerant", "strict"],
        Meta(
            description="tolerant: accept common syntax errors, such as a..b@example.org, an underscore in a domain or "
            "MAIL FROM:<root>; strict: the syntax of RFC 5321"
        ),
    ] = "tolerant"
    allow_untrusted_routing: Annotated[
        bool,
        Meta(
            description="Accept user%other.example@domain, other.example!user@domain and the like from clients that "
            "may not relay. A next hop that obeys them becomes an open relay"
        ),
    ] = False
    mode: Annotated[str, Meta(description="Permissions of a unix socket, in octal")] = "0660"
    group: Annotated[
        str, Meta(description="Group of a unix socket: a name or a number; that of the process when empty")
    ] = ""
    tls: TlsSettings = TlsSettings()
    auth: Annotated[AuthSettings | None, Meta(description="Without this table there is no AUTH")] = None
    limits: LimitSettings = LimitSettings()
    wire: WireSettings = WireSettings()
    extensions: ExtensionSettings = ExtensionSettings()


DELIVERY_KINDS: Final = ("spool", "passthrough", "maildir", "discard")


class DeliverySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where accepted messages go."""

    kind: Annotated[
        str,
        Meta(
            description="spool: on stable storage before the 250, then where the routes say; passthrough: to the "
            "next hop before the 250, into the spool when that is slow or down; maildir: into the Maildir before the "
            "250; discard: nowhere; package.module:Class or path/to/file.py:Class: your own delivery in Python"
        ),
    ] = "spool"
    arguments: Annotated[dict[str, Any], Meta(description="Keyword arguments of a delivery of your own")] = {}  # noqa: RUF012 - msgspec copies it
    maildir: MaildirSettings = MaildirSettings()
    passthrough: PassthroughSettings = PassthroughSettings()

    @property
    def has_relay(self) -> bool:
        """Mail goes through the spool, or past it."""
        return self.kind in ("spool", "passthrough")


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The process as a whole."""

    grace: Annotated[
        float,
        Meta(ge=0, le=3600, description="Seconds a message under way has to arrive once the server stops"),
    ] = 30.0
    workers: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="Processes, each with a part of the spool and limits of its own",
        ),
    ] = 1


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configuration file."""

    hostname: Annotated[
        str,
        Meta(description="The name in the greeting and in Received fields; the machine's name when empty"),
    ] = ""
    domains: Annotated[
        tuple[str, ...] | None,
        Meta(description='Domains everybody may send to; ".example.org" is all names below. Without it, every domain'),
    ] = None
    data_dir: Annotated[str, Meta(description="The folder of all that is kept, relative to the file")] = "penstock-data"
    listener: Annotated[
        tuple[ListenerSettings, ...], Meta(min_length=1, description="Where clients come in; repeat for more")
    ] = (ListenerSettings(),)
    delivery: DeliverySettings = DeliverySettings()
    spool: SpoolSettings = SpoolSettings()
    route: Annotated[
        tuple[RouteSettings, ...],
        Meta(description="Where mail goes out of the spool; without any, into the Maildir"),
    ] = ()
    relay: RelaySettings = RelaySettings()
    resolver: ResolverSettings = ResolverSettings()
    admission: AdmissionSettings = AdmissionSettings()
    body: BodySettings = BodySettings()
    recipients: RecipientSettings = RecipientSettings()
    check: Annotated[tuple[HookSettings, ...], Meta(description="Policies in Python, asked in this order")] = ()
    journal: JournalSettings = JournalSettings()
    server: ServerSettings = ServerSettings()

    @property
    def own_hostname(self) -> str:
        """The configured name, or the machine's."""
        if self.hostname:
            return canonical_domain(self.hostname)
        found = socket.getfqdn()
        return found if "." in found else socket.gethostname()


# ---- reading


def load(path: Path) -> Settings:
    """Read a file. Raise ConfigError, with the file and the key, when it can not be used."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: a configuration is UTF-8 text") from exc
    try:
        settings = parse(text)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return _relative_to(path.absolute().parent, settings)


def _relative_to(folder: Path, settings: Settings) -> Settings:
    """Return the settings of a file with its relative paths made absolute: data_dir, and Python files."""
    replace = msgspec.structs.replace

    def located(reference: str) -> str:
        place, colon, name = reference.rpartition(":")
        return f"{folder / place}{colon}{name}" if place.endswith(".py") else reference

    return replace(
        settings,
        data_dir=str(folder / settings.data_dir),
        check=tuple(replace(each, hook=located(each.hook)) for each in settings.check),
        delivery=replace(settings.delivery, kind=located(settings.delivery.kind)),
    )


def parse(text: str) -> Settings:
    """Read settings from TOML and check them. Raise ConfigError."""
    try:
        table = schema.parse_table(text)
    except SchemaError as exc:
        raise ConfigError(str(exc)) from exc
    return from_table(table)


def from_table(table: Mapping[str, object], *, allow_open: bool = False) -> Settings:
    """Make settings of a table, as TOML has it, and check them. Raise ConfigError."""
    try:
        settings = schema.convert(table, Settings)
    except SchemaError as exc:
        raise ConfigError(str(exc)) from exc
    check(settings, allow_open=allow_open)
    return settings


# ---- checking what no single key can know


def check(settings: Settings, *, allow_open: bool = False) -> None:
    """Raise ConfigError for values that do not fit together. `allow_open` lets an open relay through: a sink is one."""
    if settings.hostname and domain_of(settings.hostname, utf8=True) is None:
        raise ConfigError(f"hostname: {settings.hostname!r} is not a host name")
    for domain in settings.domains or ():
        try:
            canonical_domain(domain.removeprefix("."))
        except ValueError as exc:
            raise ConfigError(
                f'domains: {domain!r} is not a domain; expected "example.org", or ".example.org" for all names below it'
            ) from exc
    _check_delivery(settings.delivery)
    _check_outbound(settings)
    _check_networks("admission.exempt", settings.admission.exempt)
    unknown = re.search(r"[{}]", re.sub(r"\{(local|domain)\}", "", settings.delivery.maildir.path))
    if unknown:
        raise ConfigError(
            f"delivery.maildir.path: {{local}} and {{domain}} may stand in it, and no other brace, not "
            f"{settings.delivery.maildir.path!r}"
        )
    if settings.recipients.verify and settings.recipients.file:
        raise ConfigError("recipients.verify: recipients.file is there already; use one of the two")
    if settings.recipients.verify and not settings.delivery.has_relay:
        raise ConfigError(f'recipients.verify: delivery.kind = "{settings.delivery.kind}" has no next hop to ask')
    names = [listener.name or listener.address for listener in settings.listener]
    for number, listener in enumerate(settings.listener):
        if names.count(names[number]) > 1:
            raise ConfigError(f"listener[{number}].name: {names[number]!r} is the name of another listener, too")
        try:
            _check_listener(listener, settings, allow_open=allow_open)
        except ConfigError as exc:
            raise ConfigError(f"listener[{number}].{exc}") from exc


def _check_delivery(delivery: DeliverySettings) -> None:
    """Check the kind of the delivery: a known word, or an object of the operator's own."""
    if ":" in delivery.kind:
        return
    if delivery.kind not in DELIVERY_KINDS:
        expected = ", ".join(DELIVERY_KINDS)
        raise ConfigError(
            f"delivery.kind: {delivery.kind!r}: expected one of: {expected}; or package.module:Class, file.py:Class"
        )
    if delivery.arguments:
        raise ConfigError(f'delivery.arguments: delivery.kind = "{delivery.kind}" takes none')


def _check_outbound(settings: Settings) -> None:
    """Check routes, the relay and the resolver."""
    try:
        check_routes(settings.route)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    source = settings.relay.pool.source
    try:
        if source:
            ipaddress.ip_address(source)
    except ValueError as exc:
        raise ConfigError(f"relay.pool.source: {exc}") from exc
    for number, server in enumerate(settings.resolver.servers):
        try:
            parse_server(server)
        except ValueError as exc:
            raise ConfigError(f"resolver.servers[{number}]: {exc}") from exc
    if settings.resolver.ttl_least > settings.resolver.ttl_most:
        raise ConfigError(f"resolver.ttl_least: it is more than resolver.ttl_most = {settings.resolver.ttl_most}")


def _check_networks(key: str, networks: tuple[str, ...]) -> None:
    for network in networks:
        try:
            parse_network(network)
        except ValueError as exc:
            raise ConfigError(f"{key}: {exc}") from exc


def _check_listener(listener: ListenerSettings, settings: Settings, *, allow_open: bool) -> None:
    try:
        address = ListenAddress.parse(listener.address)
    except ValueError as exc:
        raise ConfigError(f"address: {exc}") from exc
    for key, check in (("mode", parse_mode), ("group", find_group)):
        try:
            if getattr(listener, key):
                check(getattr(listener, key))
        except ValueError as exc:
            raise ConfigError(f"{key}: {exc}") from exc
    _check_networks("proxy_networks", listener.proxy_networks)
    _check_networks("relay_networks", listener.relay_networks)
    _check_tls(listener.tls)
    is_open = settings.domains is None and not (listener.auth is not None and listener.auth.required)
    if is_open and not allow_open and not address.is_loopback:
        raise ConfigError(
            f"address: {address} can be reached from other machines and takes mail for every domain from anybody: an "
            'open relay. Set domains = ["example.org", ...], or [listener.auth] required = true'
        )
    if listener.auth is not None:
        _check_auth(listener.auth, has_tls=listener.tls.mode != "none")


def _check_tls(tls: TlsSettings) -> None:
    if tls.mode == "none" and tls.required:
        raise ConfigError('tls.required: tls.mode = "none" offers none; nobody could send mail')
    if tls.key and not tls.certificate:
        raise ConfigError("tls.key: tls.certificate is missing, whose key it is")
    if tls.ciphers:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(tls.ciphers)
        except ssl.SSLError as exc:
            raise ConfigError(f"tls.ciphers: OpenSSL has no cipher that is called {tls.ciphers!r}") from exc


def _check_auth(auth: AuthSettings, *, has_tls: bool) -> None:
    for name in auth.mechanisms:
        if auth.mechanisms.count(name) > 1:
            raise ConfigError(f"auth.mechanisms: {name!r} is there twice")
    if auth.required and not auth.mechanisms:
        raise ConfigError("auth.mechanisms: auth.required = true, and no mechanism is offered; nobody could send mail")
    if not has_tls and not auth.without_tls and "SCRAM-SHA-256" not in auth.mechanisms:
        raise ConfigError("auth: no mechanism is left without TLS; set [listener.tls] or auth.without_tls = true")


# ---- showing


def to_toml(settings: Settings, *, only_changed: bool = False) -> str:
    """Return the settings as TOML: all of them, or those that are not the default."""
    table = msgspec.to_builtins(settings)
    if only_changed:
        table = _difference(table, msgspec.to_builtins(Settings()))
    return tomli_w.dumps(_without_none(table))


def _difference(value: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        before = default.get(key)
        if item == before:
            continue
        result[key] = _difference(item, before) if isinstance(item, dict) and isinstance(before, dict) else item
    return result


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def describe() -> str:
    """Return the reference of all keys as TOML with the defaults; tables that are not there by default are comments."""
    return schema.describe(Settings)
