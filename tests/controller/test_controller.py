"""The controller over real sockets: who may ask, what is answered, and a manager that serves meanwhile."""

import contextlib
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading

import pytest

from kvbm_jax.cli import main
from kvbm_jax.controller import ControlClient, Controller, commands, running_workers
from kvbm_jax.controller.commands import Listing
from kvbm_jax.errors import BlockStateError, BusyError, ConfigError, TransportError
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.runtime_folder import runtime_folder
from tests.tiered import HOST, SIZE, check, disk, make, prefill, prompt, serve, settle

TOKEN = "a token of the tests, long enough".replace(" ", "-")


def hex_of(tokens):
    return [words.tobytes().hex() for words in hash_sequence(tokens, SIZE)]


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    """A runtime folder for this test, with a short name: a socket's path has at most 107 bytes."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "kvbm_jax"


@pytest.fixture
def manager():
    with make(**HOST, host_blocks=16, max_sequences=2, controller="auto", worker_id="w/1") as owner:
        yield owner


@pytest.fixture
def client(manager):
    return ControlClient()


@pytest.fixture
def logger():
    """One that commands may set the level of; left as it was."""
    found = logging.getLogger("kvbm_jax.offload")
    before = found.level
    yield found
    found.setLevel(before)


def ask(url, method, path, body=None, **headers):
    """A request of another program; returns status and answer."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_status_tells_what_the_manager_holds(manager, client):
    serve(manager, prompt(0, 2))
    manager.command(lambda upkeep: upkeep.evict(1))
    settle(manager)
    with manager.start(prompt(100, 1)):
        told = client.ask("status")
    assert told["worker_id"] == "w/1"
    assert told["pid"] == os.getpid()
    assert (told["num_blocks"], told["block_size"]) == (8, SIZE)
    assert told["sequences"] == {"running": 1, "max": 2}
    assert told["blocks"] == {"reset": 5, "inactive": 1, "held": 2, "pinned": 0}
    assert told["tiers"]["g2"]["blocks"] == 1
    assert running_workers() == ["w/1"]


def test_commands_do_what_the_manager_does(manager, client):
    kept, other = prompt(0, 2), prompt(100, 2)
    serve(manager, kept)
    serve(manager, other)
    absent = "00" * 16
    assert client.ask("pin", hashes=[*hex_of(kept), absent]) == {"blocks": 2, "absent": [absent]}
    assert client.ask("evict", blocks=0) == {"blocks": 0}
    assert client.ask("evict", hashes=hex_of(other)[1:]) == {"blocks": 1}
    settle(manager)
    listed = client.ask("snapshot", all=True)["blocks"]
    assert {(row["tier"], row["hash"], row["parent"]) for row in listed} == {
        ("g1", hex_of(kept)[0], None),
        ("g1", hex_of(kept)[1], hex_of(kept)[0]),
        ("g1", hex_of(other)[0], None),
        ("g2", hex_of(other)[1], hex_of(other)[0]),
    }
    assert [row["tier"] for row in client.ask("snapshot", tier="g2")["blocks"]] == ["g2"]
    assert client.ask("reset", tier="g2") == {"blocks": {"g2": 1}}
    assert client.ask("evict", blocks=10**30) == {"blocks": 1}
    assert client.ask("reset", all=True) == {"blocks": {"g2": 1}}
    assert client.ask("unpin", hashes=hex_of(kept)[:1]) == {"blocks": 1}
    assert client.ask("unpin", all=True) == {"blocks": 1}
    assert client.ask("reset", hashes=hex_of(kept)) == {"blocks": {"g1": 2}}
    assert client.ask("flush", seconds=1) == {"written": 0, "failed": 0, "pending": 0}


def test_a_flush_is_on_disk_when_it_is_answered(tmp_path):
    with make(**disk(tmp_path / "disk"), controller="auto", max_sequences=2) as manager:
        serve(manager, prompt(0, 3))
        assert ControlClient().ask("flush")["written"] == 3
        assert manager.tier_stats()[3].blocks == 3


@pytest.mark.parametrize(
    ("command", "fields", "message"),
    [
        ("reset", {}, "give one of all, tier, hashes; given: none"),
        ("reset", {"all": True, "tier": "g1"}, "given: all, tier"),
        ("reset", {"tier": "g9"}, "tier = 'g9': allowed is one of g1, g2, g3, g4"),
        ("reset", {"tier": "g3"}, "there is no tier g3 here; there are g1, g2"),
        ("reset", {"hashes": ["0x" + "0" * 30]}, "is no hash of a block: allowed are 32 hexadecimal digits"),
        ("reset", {"hashes": ["00 " * 16]}, "is no hash of a block"),
        ("evict", {"blocks": -1}, "-1 blocks cannot be evicted"),
        ("evict", {"blocks": "3"}, r"Expected `int \| null`, got `str` - at `\$.blocks`"),
        ("pin", {"hash": []}, "unknown field `hash`"),
        ("flush", {"seconds": -1}, r"Expected `float` >= 0"),
        ("log_level", {"level": "loud"}, "level = 'loud': allowed is one of debug"),
        ("log_level", {"level": "debug", "logger": "jax"}, "logger = 'jax': allowed are kvbm_jax"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(client, command, fields, message):
    with pytest.raises(ConfigError, match=message):
        client.ask(command, **fields)


def test_an_unknown_command_is_told_which_there_are(client):
    with pytest.raises(TransportError, match="/v1/restart: there are /v1/status, /v1/reset"):
        client.ask("restart")


def test_log_levels_are_those_of_logging(client, logger):
    assert client.ask("log_level", level="debug", logger=logger.name)["level"] == "debug"
    assert logger.level == logging.DEBUG
    assert client.ask("log_level", level="error", logger=logger.name)["before"] == "debug"


def test_commands_are_carried_out_while_the_manager_serves(manager):
    """Four operators against one serving thread: its sequences are what they should be, and no command is left out."""
    clients, done, failed = [ControlClient() for _ in range(4)], [], []
    prompts = [prompt(100 * i, 3) for i in range(4)]

    def operate(client, number):
        try:
            for i in range(25):
                hashes = hex_of(prompts[(number + i) % 4])
                for command, fields in [
                    ("pin", {"hashes": hashes[:1]}),
                    ("evict", {"blocks": 2}),
                    ("unpin", {"all": True}),
                    ("reset", [{"tier": "g2"}, {"hashes": hashes}, {"all": True}][i % 3]),
                    ("status", {}),
                ]:
                    done.append(client.ask(command, **fields))
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=operate, args=(client, i)) for i, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    rounds = 0
    while any(thread.is_alive() for thread in threads) or rounds < 4:
        with manager.start(prompts[rounds % 4]) as seq:
            prefill(manager, seq)
            manager.register(seq)
            manager.extend({seq: [7]})
            prefill(manager, seq, len(seq.tokens) - 1)
            check(manager, seq)
        rounds += 1
    for thread in threads:
        thread.join(60)
    assert not failed
    assert len(done) == 4 * 25 * 5
    manager.command(lambda upkeep: upkeep.unpin())
    assert manager.stats().held == 0
    manager.clear()
    assert manager.stats() == (8, 0, 0)


def test_a_command_does_not_wait_for_ever(manager, client):
    asked, answered = threading.Event(), threading.Event()

    def step(cache):
        asked.set()
        answered.wait(60)
        return cache, None

    server = threading.Thread(target=manager.run, args=(step,))
    server.start()
    assert asked.wait(60)
    for command in ("status", "flush"):
        with pytest.raises(BusyError, match=r"in one call for 0\.05 seconds"):
            client.ask(command, wait=0.05)
    answered.set()
    server.join(60)
    assert client.ask("status")["blocks"]["held"] == 0


def test_closing_waits_for_commands_and_leaves_nothing(manager, client, runtime):
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    silent.connect(str(runtime / "w%2F1.sock"))  # a caller that asks nothing does not hold it up
    client.ask("status")  # by now the other has been let in
    manager.close()
    assert silent.recv(100) == b""
    silent.close()
    with pytest.raises(TransportError, match="no controller answers at unix://"):
        client.ask("status")
    assert [path.name for path in runtime.iterdir()] == ["w%2F1.sock.lock"]
    with pytest.raises(TransportError, match="no manager with a controller runs"):
        ControlClient()


def test_a_closed_manager_says_so(manager, runtime):
    controller = Controller(manager, f"unix://{runtime}/other")
    manager.close()
    with controller, pytest.raises(BlockStateError, match="the manager is closed"):
        ControlClient(controller.url).ask("status")


def test_workers_are_told_apart(manager):
    with pytest.raises(
        TransportError, match=r"another controller listens at unix://.*worker_id or an address of its own"
    ):
        Controller(manager)
    with Controller(manager, f"unix://{runtime_folder()}/second.sock"):
        assert running_workers() == ["second", "w/1"]
        with pytest.raises(TransportError, match=r"2 workers run: second, w/1; name one \(--worker\)"):
            ControlClient()
        assert ControlClient(worker_id="w/1").ask("status")["worker_id"] == "w/1"


ORPHAN = """
import os, socket, sys
here = socket.socket(socket.AF_UNIX)
here.bind(sys.argv[1])
os._exit(0)
"""


def test_what_a_killed_process_left_is_replaced(manager, runtime):
    path = runtime / "gone.sock"
    subprocess.run([sys.executable, "-c", ORPHAN, str(path)], check=True, timeout=60)
    assert path.exists()
    assert running_workers() == ["w/1"]
    with Controller(manager, f"unix://{path}") as controller:
        assert ControlClient(controller.url).ask("status")["pid"] == os.getpid()


def test_the_socket_is_this_users_alone(manager, runtime):
    assert runtime.stat().st_mode & 0o777 == 0o700
    assert (runtime / "w%2F1.sock").stat().st_mode & 0o777 == 0o600
    runtime.chmod(0o770)
    with pytest.raises(ConfigError, match=r"must be a folder of user .* with mode 700; it is drwxrwx---"):
        runtime_folder()
    runtime.chmod(0o700)


def test_a_folder_planted_by_another_is_refused(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "kvbm_jax").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="must be a folder of user"):
        runtime_folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR"):
        runtime_folder()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://0.0.0.0:0", "can be reached from other machines: give the controller a token"),
        ("http://[::]:0", "can be reached from other machines"),
        ("http://example.org:80", "can be reached from other machines"),
        ("http://127.0.0.1", "is no address of a controller; allowed are unix:///path and http://host:port"),
        ("https://127.0.0.1:0", "is no address of a controller"),
        ("http://user:pass@127.0.0.1:0", "is no address of a controller"),
        ("http://127.0.0.1:99999", "is no address of a controller: Port out of range"),
        ("unix://relative", "is no address of a controller"),
        ("unix:///a%00b", "has a zero byte in it"),
        ("unix:///" + "x" * 120, "is 121 bytes long; a Unix socket's path has at most 107"),
    ],
)
def test_addresses_that_are_none_are_refused(manager, url, message):
    with pytest.raises(ConfigError, match=message):
        Controller(manager, url)


def test_an_address_that_cannot_be_had_is_told(manager):
    with Controller(manager, "http://127.0.0.1:0") as first, pytest.raises(TransportError, match="cannot listen at"):
        Controller(manager, first.url)
    with pytest.raises(
        TransportError, match="cannot listen at unix:///nowhere/at/all: No such file or directory"
    ) as told:
        Controller(manager, "unix:///nowhere/at/all")
    assert isinstance(told.value, OSError)


def test_what_stands_at_a_path_is_nobodys_but_a_dead_controllers(manager, tmp_path):
    (tmp_path / "notes").write_text("precious")
    (tmp_path / "link.lock").symlink_to(tmp_path / "made")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        for name, message in {
            "notes": "notes: what stands there is no socket; name another path",
            "": ": what stands there is no socket",
            "other": "other: another program listens there",
            "link": "cannot listen at",
        }.items():
            with pytest.raises(TransportError, match=message):
                Controller(manager, f"unix://{tmp_path}/{name}")
    assert (tmp_path / "notes").read_text() == "precious"
    assert not (tmp_path / "made").exists()
    with Controller(manager, f"unix://{tmp_path}/other") as controller:  # nobody listens there any more
        assert ControlClient(controller.url).ask("status")["num_blocks"] == 8


def test_who_connects_and_asks_nothing_keeps_nobody_out(manager):
    with Controller(manager, "http://127.0.0.1:0", token=TOKEN) as controller, contextlib.ExitStack() as opened:
        port = int(controller.url.rpartition(":")[2])
        for _ in range(40):  # more than a controller has room for, each in the middle of a header
            idle = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            idle.sendall(b"GET /v1/status HTTP/1.1\r\nX: ")
        for _ in range(3):
            assert ControlClient(controller.url, token=TOKEN).ask("status")["num_blocks"] == 8


@pytest.mark.parametrize("count", [0, 1, 1000, 2001])
def test_a_listing_is_the_json_of_all_of_it(count):
    rows = [{"hash": f"{number:032x}", "parent": None} for number in range(count)]
    pieces = list(Listing({"worker_id": "w"}, iter(rows)).pieces())
    assert json.loads("".join(pieces)) == {"worker_id": "w", "blocks": rows}
    assert max(map(len, pieces)) < 100_000


def test_a_listing_of_many_blocks_is_never_there_as_a_whole(manager, monkeypatch):
    made = []

    def row(number):
        made.append(number)
        return {"hash": f"{number:032x}"}

    monkeypatch.setitem(
        commands.COMMANDS,
        "snapshot",
        commands.COMMANDS["snapshot"]._replace(act=lambda *_: Listing({}, map(row, range(300_000)))),
    )
    with Controller(manager, "http://127.0.0.1:0") as controller:
        host, port = controller.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            lines = [
                "POST /v1/snapshot HTTP/1.0",
                "Host: localhost",
                "Content-Type: application/json",
                "Content-Length: 2",
            ]
            slow.sendall("\r\n".join([*lines, "", "{}"]).encode())
            first = slow.recv(1000)
            assert first.startswith(b"HTTP/1.0 200")
            assert len(made) < 300_000, "it waits for who reads"
            rest = first + b"".join(iter(lambda: slow.recv(1 << 20), b""))
    assert len(json.loads(rest.partition(b"\r\n\r\n")[2])["blocks"]) == len(made) == 300_000


@pytest.mark.parametrize("url", ["http://127.0.0.1:0", "http://[::1]:0", "unix"])
def test_a_token_is_asked_for_wherever_one_is_set(manager, runtime, url):
    with Controller(manager, f"unix://{runtime}/t" if url == "unix" else url, token=TOKEN) as controller:
        assert ControlClient(controller.url, token=TOKEN).ask("status")["num_blocks"] == 8
        for token in (None, TOKEN[:-1] + "x", TOKEN + "x"):
            for command in ("status", "reset"):
                with pytest.raises(TransportError, match="bearer token is missing or wrong"):
                    ControlClient(controller.url, token=token).ask(command)


@pytest.mark.parametrize("token", ["short", "with spaces in it, and long", "ünprintable-and-long"])
def test_tokens_that_protect_nothing_are_refused(manager, token):
    with pytest.raises(ConfigError, match=r"has at least 16 printable ASCII characters and no space"):
        Controller(manager, "http://127.0.0.1:0", token=token)


def test_what_a_browser_sends_across_sites_is_refused(manager):
    with Controller(manager, "http://127.0.0.1:0") as controller:
        here, json_type = controller.url, "application/json"
        assert ask(here, "GET", "/v1/status")[0] == 200
        assert ask(here, "GET", "/v1/status", Host="evil.example:80")[0] == 403
        assert ask(here, "GET", "/v1/status", Host="localhost")[0] == 200
        assert ask(here, "POST", "/v1/reset", b'{"all": true}', Host="evil.example", Content_Type=json_type)[0] == 403
        assert ask(here, "POST", "/v1/reset", b'{"all": true}', Content_Type="text/plain")[0] == 415
        assert ask(here, "POST", "/v1/reset", b'{"all": true}', Content_Type=json_type)[0] == 200


def test_http_that_is_not_spoken_here_is_answered_in_json(manager):
    with Controller(manager, "http://127.0.0.1:0") as controller:
        here, typed = controller.url, {"Content_Type": "application/json"}
        assert ask(here, "GET", "/v1/reset")[0] == 405
        assert ask(here, "GET", "/")[0] == 404
        assert ask(here, "PUT", "/v1/reset")[0] == 501
        assert ask(here, "POST", "/v1/reset", b"[" * 100_000, **typed)[0] == 400
        for body in (b"\xff", b'{"tier": "\xff"}', b'{"\xff": 1}'):
            assert ask(here, "POST", "/v1/reset", body, **typed)[0] == 400
        assert ask(here, "POST", "/v1/reset", b" " * (5 << 20), **typed)[0] == 413
        assert ask(here, "POST", "/v1/reset", iter([b"{}"]), **typed)[0] == 411
        for length, status in (
            ("9" * 5000, 413),
            ("0" * 20 + "99999999999", 413),
            ("0" * 5000 + "2", 400),
            ("-2", 411),
        ):
            assert ask(here, "POST", "/v1/reset", b"{}", **typed, Content_Length=length)[0] == status
        status, answer = ask(here, "GET", "/v1/" + "x" * 70_000)
        assert (status, answer["error"]["type"]) == (414, "TransportError")


def test_a_client_that_meets_something_else_says_so(tmp_path):
    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        for reply in (b"HTTP/1.0 200 OK\r\n\r\n[1]", b"SSH-2.0\r\n"):
            peer, _ = server.accept()
            asked = b""
            while not asked.endswith(b"{}"):
                asked += peer.recv(1 << 16)
            peer.sendall(reply)
            peer.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    client = ControlClient(f"http://127.0.0.1:{server.getsockname()[1]}")
    with pytest.raises(TransportError, match=r"not a controller's answer: \[1\]"):
        client.ask("status")
    with pytest.raises(TransportError, match="no controller answers"):
        client.ask("status")
    thread.join(60)
    server.close()


def test_the_configuration_opens_and_closes_it(tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    with pytest.raises(ConfigError, match="controller is unset"):
        make(controller_token_file=token)
    with pytest.raises(ConfigError, match=r"the controller's token: .*No such file"):
        make(controller="auto", controller_token_file=tmp_path / "absent")
    with make(controller="auto", controller_token_file=token):
        assert ControlClient(token=TOKEN).ask("status")["worker_id"] == "0"
        with pytest.raises(TransportError, match="another controller listens"):
            make(controller="auto")


# The command line.


def run(capsys, *arguments):
    status = main([*arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_line_asks_the_running_worker(manager, capsys, logger):
    serve(manager, prompt(0, 2))
    first, second = hex_of(prompt(0, 2))
    status, out, _ = run(capsys, "status")
    assert status == 0
    assert "blocks inactive      2" in out
    assert json.loads(run(capsys, "pin", "--json", first)[1]) == {"blocks": 1, "absent": []}
    assert json.loads(run(capsys, "evict", "--json", "--blocks", "0")[1]) == {"blocks": 0}
    assert json.loads(run(capsys, "evict", "--json", "--worker", "w/1", "--hashes", second)[1]) == {"blocks": 1}
    settle(manager)
    assert second in run(capsys, "snapshot")[1]
    assert second not in run(capsys, "snapshot", "--tier", "g1")[1]
    assert json.loads(run(capsys, "unpin", "--json", "--all")[1]) == {"blocks": 1}
    assert json.loads(run(capsys, "reset", "--json", "--all")[1]) == {"blocks": {"g1": 1, "g2": 1}}
    assert json.loads(run(capsys, "flush", "--json", "--seconds", "5")[1])["pending"] == 0
    assert "before" in run(capsys, "log-level", "warning", "--logger", logger.name)[1]
    assert logger.level == logging.WARNING


def test_the_command_line_tells_what_went_wrong_in_a_line(manager, capsys, tmp_path):
    status, out, err = run(capsys, "reset", "--tier", "g3")
    assert (status, out) == (1, "")
    assert err == "kvbm-jax: error: there is no tier g3 here; there are g1, g2\n"
    assert "no controller answers at unix:///nowhere" in run(capsys, "status", "--url", "unix:///nowhere")[2]
    with Controller(manager, "http://127.0.0.1:0", token=TOKEN) as controller:
        assert "bearer token is missing" in run(capsys, "status", "--url", controller.url)[2]
        token = tmp_path / "token"
        token.write_text(TOKEN)
        assert run(capsys, "status", "--url", controller.url, "--token-file", str(token))[0] == 0
    seconds = [["flush", f"{name}={text}"] for name in ("--wait", "--seconds") for text in ("nan", "inf", "-1", "1e6")]
    for wrong in (["reset"], ["reset", "--all", "--tier", "g1"], ["pin"], ["evict", "--blocks", "-1"], *seconds):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
