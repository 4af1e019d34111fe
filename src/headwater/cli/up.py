"""`headwater up`: a broker, a schema registry and applications, supervised; `up stop|start NAME...` from another terminal.

    DIR/broker        the broker's data            DIR/<app>.db    an application's SQLite database
    DIR/up.sock       where stop and start are heard

Each is a process of its own. One that dies is started again, after a second at first and after ten at most. On SIGTERM
the applications stop before the broker, so that each can commit where it is.
"""

import asyncio
import contextlib
import importlib.util
import json as json_library
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.output import CANNOT_BE, Json, UserError, console, explained, show_json, show_table

app = typer.Typer(
    invoke_without_command=True, help="A broker, a schema registry and applications, on one machine, supervised."
)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 10.0
STEADY_SECONDS = 30.0  # one that ran this long starts again without a pause next time
STOP_SECONDS = 40.0  # an application has 20 s for its handlers, 10 for its requests, and some for what is under way
MAX_SOCKET_PATH = 100  # bytes; the system's limit is 108
BROKER = "broker"
REGISTRY = "registry"

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Of processes, as `headwater up status` has them.")]
Data = Annotated[Path, typer.Option("--data", help="Directory of the broker, the databases and the control socket.")]


def say(name: str, **facts: object) -> None:
    """One line about a process: for people, or as JSON."""
    if Speech.as_json:
        print(json_library.dumps({"name": name, **facts}), flush=True)
    else:
        console.print(
            f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items()), highlight=False
        )


class Speech:
    as_json = False


def _die_with_parent() -> None:
    """In the child, on Linux: a supervisor that is killed must not leave its processes behind."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Supervised:
    """One process that shall run."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], address: str = "", *, announces: bool = False
    ) -> None:
        """announces: it says `ready ADDRESS` when it answers. One that never got so far is not started again by itself."""
        self.name = name
        self.announces = announces
        self.command = command
        self.environment = environment
        self.address = address
        self.process: asyncio.subprocess.Process | None = None
        self.wanted = True
        self.changed = asyncio.Event()
        self.stopped = asyncio.Event()
        """Not running, and not about to."""
        self.first_code: int | None = None
        """The exit code, when it ended before it was ready for the first time."""

    async def supervise(self) -> None:
        """Keep it running while it is wanted."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            if not self.wanted:
                self.changed.clear()
                self.stopped.set()
                await self.changed.wait()
                continue
            self.stopped.clear()
            started = time.monotonic()
            code = await self._run_once()
            if not self.wanted:
                say(self.name, state="stopped", **({"code": code} if code not in (0, -signal.SIGTERM) else {}))
                continue
            if code == CANNOT_BE or (self.announces and not self.address):
                self.first_code = code
                self.wanted = False
                say(self.name, state="did not start, it says why above", code=code)
                continue
            if time.monotonic() - started > STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            say(self.name, state="ended", code=code, starts_again_in=f"{pause:.0f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _run_once(self) -> int:
        self.process = process = await asyncio.create_subprocess_exec(
            *self.command,
            env={**os.environ, **self.environment},
            stdout=asyncio.subprocess.PIPE if self.announces else None,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        if not self.wanted:  # stopped while it was being started
            process.send_signal(signal.SIGTERM)
        ready = True
        if self.announces:
            assert process.stdout is not None
            line = (await process.stdout.readline()).decode()
            ready = line.startswith("ready ")
            if ready:
                self.address = line.removeprefix("ready ").strip()
                # what starts again keeps its address: the others know no other
                self.command[self.command.index("--listen") + 1] = self.address.removeprefix("http://")
        if ready:
            say(self.name, **({"address": self.address} if self.address else {}), pid=process.pid)
        code = await process.wait()
        self.process = None
        return code

    def stop(self) -> None:
        self.wanted = False
        self.changed.set()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def start(self) -> None:
        self.wanted = True
        self.changed.set()

    async def wait_stopped(self) -> None:
        try:
            await asyncio.wait_for(self.stopped.wait(), STOP_SECONDS)
        except TimeoutError:
            say(self.name, killed_after_seconds=STOP_SECONDS)
            if self.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), 5.0)

    def status(self) -> dict[str, object]:
        return {
            "name": self.name,
            "running": self.process is not None,
            "state": "running" if self.process is not None else "starts again soon" if self.wanted else "stopped",
            "pid": self.process.pid if self.process is not None else None,
            "address": self.address or None,
        }


@app.callback()
def up(
    context: typer.Context,
    data: Data = Path("./headwater-data"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The broker's port on 127.0.0.1; 0 takes a free one.")
    ] = 9092,
    bootstrap_servers: Annotated[
        str | None, typer.Option(help="Use this cluster; no broker is started.", envvar="HEADWATER_BOOTSTRAP_SERVERS")
    ] = None,
    application: Annotated[
        list[str] | None, typer.Option("--app", metavar="MODULE:APP", help="An application; repeatable.")
    ] = None,
    registry_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The schema registry's port on 127.0.0.1; 0 takes a free one.")
    ] = 8081,
    with_registry: Annotated[bool, typer.Option("--registry/--no-registry", help="Start the schema registry.")] = True,
    json: Json = False,
) -> None:
    """Start everything and keep it running until SIGTERM or Ctrl-C."""
    Speech.as_json = json
    if context.invoked_subcommand is not None:
        context.obj = data
        return
    with explained("up"):
        data.mkdir(parents=True, exist_ok=True)
        if _came_from(context, "port", "COMMANDLINE") and _came_from(context, "bootstrap_servers", "ENVIRONMENT"):
            say("broker", ignores=f"HEADWATER_BOOTSTRAP_SERVERS={bootstrap_servers}", because="--port is given")
            bootstrap_servers = None
        named = os.environ.get("HEADWATER_REGISTRY_URL")
        if named is not None and with_registry and not _came_from(context, "registry_port", "COMMANDLINE"):
            say(REGISTRY, address=named, process="not started here, as HEADWATER_REGISTRY_URL is set")
            with_registry = False
        port_of_registry = registry_port if with_registry else None
        code = asyncio.run(_supervise(data.resolve(), port, bootstrap_servers, port_of_registry, application or []))
    raise typer.Exit(code)


def _came_from(context: typer.Context, name: str, where: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == where


async def _supervise(data: Path, port: int, servers: str | None, registry_port: int | None, targets: list[str]) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    everyone: list[Supervised] = []
    tasks: list[asyncio.Task[None]] = []
    control = await _listen(data, everyone)
    try:
        if servers is None:
            command = [sys.executable, "-m", "headwater", "broker", "--data", str(data / BROKER)]
            broker = Supervised(BROKER, [*command, "--listen", f"127.0.0.1:{port}"], {}, announces=True)
            everyone.append(broker)
            tasks.append(asyncio.create_task(broker.supervise()))
            while not broker.address and not stop.is_set():
                if broker.first_code is not None:
                    raise UserError(f"the broker did not start (exit code {broker.first_code}); it says why above.")
                await asyncio.sleep(0.01)
            servers = broker.address
        else:
            say("cluster", address=servers, broker="not started here, as --bootstrap-servers or its variable is set")
        environment = {"HEADWATER_BOOTSTRAP_SERVERS": servers}
        if registry_port is not None and importlib.util.find_spec("avro") is None:
            say(REGISTRY, state="not installed", needs="headwater[registry]")
        elif registry_port is not None:
            command = [sys.executable, "-m", "headwater", "registry", "--bootstrap-servers", servers]
            registry = Supervised(REGISTRY, [*command, "--listen", f"127.0.0.1:{registry_port}"], {}, announces=True)
            everyone.append(registry)
            tasks.append(asyncio.create_task(registry.supervise()))
            while registry_port == 0 and not registry.address and registry.first_code is None and not stop.is_set():
                await asyncio.sleep(0.01)
            environment["HEADWATER_REGISTRY_URL"] = registry.address or f"http://127.0.0.1:{registry_port}"
        for target in targets:
            names = [each.name for each in everyone]
            everyone.append(_application(target, data, environment, names, is_own=bool(names) and names[0] == BROKER))
            tasks.append(asyncio.create_task(everyone[-1].supervise()))
        await stop.wait()
    finally:
        if not Speech.as_json:
            console.print("stopping", highlight=False)
        for group in ([each for each in everyone if each.name != BROKER], everyone):
            for each in group:
                each.stop()
            await asyncio.gather(*(each.wait_stopped() for each in group))
        for task in tasks:
            task.cancel()
        control.close()
        (data / "up.sock").unlink(missing_ok=True)
    return 0


def _application(target: str, data: Path, environment: dict[str, str], taken: list[str], *, is_own: bool) -> Supervised:
    """is_own: the cluster is ours alone, so that an application may have a name in its group: one that died and was started
    again is the same member, and its partitions don't wait for its session to end."""
    name = target.partition(":")[0].rpartition(".")[2]
    if name in (*taken, BROKER, REGISTRY):
        raise UserError(f"two processes would be called {name!r}: name the module of {target} otherwise.")
    environment = dict(environment)
    if "HEADWATER_DATABASE_URL" not in os.environ:
        environment["HEADWATER_DATABASE_URL"] = f"sqlite:///{data / name}.db"
    if is_own:
        environment["HEADWATER_KAFKA_GROUP_INSTANCE_ID"] = os.environ.get("HEADWATER_KAFKA_GROUP_INSTANCE_ID", name)
    return Supervised(name, [sys.executable, "-m", "headwater", "run", "--log-level", "warning", target], environment)


async def _listen(data: Path, everyone: list[Supervised]) -> asyncio.Server:
    path = data / "up.sock"
    if path.exists():
        try:
            _, writer = await asyncio.open_unix_connection(str(path))
            writer.close()
            raise UserError(f"another `headwater up` runs on {data}. Stop it, or take another directory with --data.")
        except ConnectionRefusedError:
            path.unlink()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # whoever asked has gone
            await answer_one(reader, writer)

    async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        action, *names = (await reader.readline()).decode().split()
        found = [each for each in everyone if each.name in names]
        strange = [name for name in names if name not in [each.name for each in everyone]]
        if strange:
            known = ", ".join(each.name for each in everyone)
            answer: dict[str, object] = {"error": f"nothing here is called {strange[0]!r}: there are {known}."}
        else:
            for each in found:
                each.stop() if action == "stop" else each.start()
            if action == "stop":
                await asyncio.gather(*(each.wait_stopped() for each in found))
            answer = {"processes": [each.status() for each in everyone]}
        writer.write(json_library.dumps(answer).encode() + b"\n")
        await writer.drain()
        writer.close()

    if len(str(path)) > MAX_SOCKET_PATH:
        raise UserError(f"the path {path} is too long for a socket: choose a shorter --data.")
    return await asyncio.start_unix_server(serve, str(path))


async def _ask(data: Path, action: str, names: Sequence[str] = ()) -> dict[str, object]:
    if any(len(name.split()) != 1 for name in names):  # a line is one request, its words are names
        raise UserError("a process's name is one word: `headwater up status` has them.")
    try:
        reader, writer = await asyncio.open_unix_connection(str(data / "up.sock"))
    except (FileNotFoundError, ConnectionRefusedError):
        raise UserError(f"no `headwater up` runs on {data}. Name its directory: headwater up --data DIR ...") from None
    try:
        writer.write(" ".join((action, *names)).encode() + b"\n")
        answer = json_library.loads(await reader.readline())
    except (ConnectionError, json_library.JSONDecodeError):
        raise UserError("the supervisor is just stopping.") from None
    finally:
        writer.close()
    if "error" in answer:
        raise UserError(str(answer["error"]))
    assert isinstance(answer, dict)
    return answer


@app.command()
def stop(context: typer.Context, names: Names, json: Json = False) -> None:
    """Stop processes, and keep them stopped."""
    with explained("up stop"):
        answer = asyncio.run(_ask(context.obj, "stop", names))
        show_json(answer) if json or Speech.as_json else console.print(f"stopped {', '.join(names)}", highlight=False)


@app.command()
def start(context: typer.Context, names: Names, json: Json = False) -> None:
    """Start processes again."""
    with explained("up start"):
        answer = asyncio.run(_ask(context.obj, "start", names))
        show_json(answer) if json or Speech.as_json else console.print(f"started {', '.join(names)}", highlight=False)


@app.command()
def status(context: typer.Context, json: Json = False) -> None:
    """What runs, where."""
    with explained("up status"):
        answer = asyncio.run(_ask(context.obj, "status"))
        if json or Speech.as_json:
            show_json(answer)
            return
        processes = answer["processes"]
        assert isinstance(processes, list)
        columns = ("name", "state", "pid", "address")
        show_table(columns, [[each[column] for column in columns] for each in processes], numbers=("pid",))
