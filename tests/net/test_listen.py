"""Listening: addresses, sockets, a shortage of descriptors."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from penstock.net._poller import accept, close
from penstock.net.listen import ListenAddress, accept_forever, bind, close_listener, find_group, name_of, parse_mode


@pytest.mark.parametrize(
    ("text", "host", "port", "is_loopback"),
    [
        ("127.0.0.1:2525", "127.0.0.1", 2525, True),
        ("[::1]:25", "::1", 25, True),
        ("[::ffff:127.0.0.1]:25", "::ffff:127.0.0.1", 25, True),
        ("[::ffff:192.0.2.1]:25", "::ffff:192.0.2.1", 25, False),
        ("localhost:0", "localhost", 0, True),
        (":25", "", 25, False),
        ("0.0.0.0:25", "0.0.0.0", 25, False),
        ("[::]:25", "::", 25, False),
        ("mx.example.org:25", "mx.example.org", 25, False),
    ],
)
def test_addresses(text: str, host: str, port: int, is_loopback: bool) -> None:
    address = ListenAddress.parse(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, is_loopback)
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "25", "127.0.0.1", "::1:25", "host:port", "host:65536", "unix:", "host:-1", "host:²"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:2525|brackets|needs a path"):
        ListenAddress.parse(text)


@pytest.mark.parametrize(
    ("listener", "ipv4", "ipv6"),
    [
        (":25", True, True),
        ("0.0.0.0:25", True, False),
        ("[::]:25", False, True),
        ("127.0.0.1:25", True, False),
        ("[::1]:25", False, True),
        ("localhost:25", True, True),
    ],
)
def test_a_listener_is_reached_by_its_versions_of_ip(listener: str, ipv4: bool, ipv6: bool) -> None:
    address = ListenAddress.parse(listener)

    def reaches(host: str) -> bool:
        return address.is_reached_by(host, 25, lambda _: False)

    assert [reaches("127.0.0.1"), reaches("0.0.0.0"), reaches("::ffff:127.0.0.1")] == [ipv4] * 3
    assert [reaches("::1"), reaches("::")] == [ipv6] * 2
    assert reaches("localhost") is (ipv4 or listener == "[::]:25")


@pytest.mark.parametrize("text", ["[[::1:25", "[[::1]]:25", "[::1:25", "::1]:25"])
def test_brackets_that_do_not_match_are_not_helped_on(text: str) -> None:
    with pytest.raises(ValueError, match="a listen address looks like"):
        ListenAddress.parse(text)


def test_a_path_that_is_too_long_is_said_to_be_and_no_more() -> None:
    with pytest.raises(OSError, match="too long") as error:
        bind(ListenAddress("", 0, "/" + "x" * 200))
    assert str(error.value).startswith("cannot listen on unix:/xxx")


def test_a_unix_socket_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    address = ListenAddress.parse(f"unix:{tmp_path / 'lmtp'}")
    (first,) = bind(address)
    with pytest.raises(OSError, match="cannot listen on unix:"):
        bind(address)
    first.close()
    (second,) = bind(address)
    assert name_of(second) == str(address)
    second.close()


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o600), (0o077, 0o660), (0o022, 0o666)])
def test_a_unix_socket_has_the_given_mode_whatever_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        (sock,) = bind(ListenAddress.parse(f"unix:{tmp_path / 'lmtp'}"), mode=mode, group=os.getgid())
    finally:
        os.umask(before)
    with sock:
        found = (tmp_path / "lmtp").stat()
        assert stat.S_IMODE(found.st_mode) == mode
        assert found.st_gid == os.getgid()


def test_a_unix_socket_is_for_the_owner_and_the_group_by_default(tmp_path: Path) -> None:
    (sock,) = bind(ListenAddress.parse(f"unix:{tmp_path / 'lmtp'}"))
    with sock:
        assert stat.S_IMODE((tmp_path / "lmtp").stat().st_mode) == 0o660


@pytest.mark.parametrize(("text", "mode"), [("0660", 0o660), ("600", 0o600), ("0777", 0o777)])
def test_modes_are_octal(text: str, mode: int) -> None:
    assert parse_mode(text) == mode


@pytest.mark.parametrize("text", ["", "0o660", "888", "66", "06600", "-660", "rw"])
def test_other_modes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="three octal digits"):
        parse_mode(text)


def test_groups_have_names_and_numbers() -> None:
    group = grp.getgrgid(os.getgid())
    assert find_group(group.gr_name) == find_group(str(group.gr_gid)) == group.gr_gid
    with pytest.raises(ValueError, match="no group 'no such group'"):
        find_group("no such group")


async def test_closing_a_unix_listener_removes_its_file(tmp_path: Path) -> None:
    (listener,) = bind(ListenAddress.parse(f"unix:{tmp_path / 'lmtp'}"))
    close_listener(listener)
    close_listener(listener)
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_bound_for_each_of_its_addresses() -> None:
    sockets = bind(ListenAddress.parse("localhost:0"))
    assert sockets
    assert all(name_of(sock).rpartition(":")[0] in ("127.0.0.1", "[::1]") for sock in sockets)
    for sock in sockets:
        sock.close()


async def test_accepting_survives_a_shortage_of_descriptors(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (listener,) = bind(ListenAddress.parse("127.0.0.1:0"))
    refusals = iter(range(2))

    def scarce(fd: int) -> tuple[int, str, int] | None:
        if next(refusals, None) is not None:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(fd)

    monkeypatch.setattr("penstock.net.listen.accept", scarce)
    shortages: list[OSError] = []
    accepted: list[tuple[int, str, int]] = []
    with listener, socket.create_connection(listener.getsockname()) as client:
        async with trio.open_nursery() as nursery:

            def handle(fd: int, address: str, port: int) -> None:
                accepted.append((fd, address, port))
                nursery.cancel_scope.cancel()

            nursery.start_soon(accept_forever, listener, handle, shortages.append)
        assert [exc.errno for exc in shortages] == [errno.EMFILE] * 2
        assert accepted[0][1:] == client.getsockname()
    close(accepted[0][0])


@pytest.mark.parametrize("address", ["127.0.0.1", "127.10.99.100", "127.255.200.9"])
def test_the_address_of_a_client_is_written_as_everywhere(address: str) -> None:
    (listener,) = bind(ListenAddress.parse("0.0.0.0:0"))
    place = ("127.0.0.1", listener.getsockname()[1])
    with listener, socket.create_connection(place, source_address=(address, 0)) as client:
        accepted = accept(listener.fileno())
        assert accepted is not None
        assert accepted[1:] == client.getsockname()
    close(accepted[0])


async def test_clients_of_an_inherited_dual_stack_socket_have_ipv4_addresses() -> None:
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    listener.setblocking(False)
    place = ("127.0.0.1", listener.getsockname()[1])
    accepted: list[tuple[int, str, int]] = []
    with listener, socket.create_connection(place) as client:
        async with trio.open_nursery() as nursery:

            def handle(fd: int, address: str, port: int) -> None:
                accepted.append((fd, address, port))
                nursery.cancel_scope.cancel()

            nursery.start_soon(accept_forever, listener, handle, lambda _: None)
        assert accepted[0][1:] == client.getsockname()
    close(accepted[0][0])
