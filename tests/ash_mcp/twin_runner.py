"""A runner's stand-in: the tools of docs/runner.md on a plain directory of this machine, without any isolation."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Refused(Exception):
    """A failure in the runner's own words."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Return a process's exit code as docs/runner.md has it: 128 and the number of a signal that ended it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


class TwinJob:
    """A process with both of its streams in one bounded buffer."""

    def __init__(self, process: subprocess.Popen[bytes], command: str, limit: int) -> None:
        self.process = process
        self.command = command
        self.changed = threading.Condition()
        self.chunks: list[tuple[str, int, bytes]] = []
        self.total = 0
        self.dropped = 0
        self.limit = limit
        self.open_streams = 2
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            threading.Thread(target=self._drain, args=(name, pipe), daemon=True).start()

    def _drain(self, name: str, pipe: Any) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), 65_536):
                with self.changed:
                    self.chunks.append((name, self.total, data))
                    self.total += len(data)
                    while self.total - self.dropped > self.limit:
                        self.dropped += len(self.chunks.pop(0)[2])
                    self.changed.notify_all()
        with self.changed:
            self.open_streams -= 1
            if self.open_streams == 0:
                self.process.wait()
                if self.process.stdin is not None:
                    with contextlib.suppress(BrokenPipeError):
                        self.process.stdin.close()
            self.changed.notify_all()

    @property
    def running(self) -> bool:
        return self.open_streams > 0

    def read(self, offset: int, limit: int, wait_seconds: float) -> Json:
        with self.changed:
            self.changed.wait_for(lambda: self.total > offset or not self.running, wait_seconds)
            found: list[Json] = []
            at = max(offset, self.dropped)
            for name, start, data in self.chunks:
                piece = data[max(at - start, 0) : max(at - start, 0) + limit]
                if start + len(data) <= at or not piece or limit <= 0:
                    continue
                found.append({"stream": name, "offset": at, "data_base64": base64.b64encode(piece).decode()})
                at, limit = at + len(piece), limit - len(piece)
            return {
                "chunks": found,
                "next_offset": at,
                "total_bytes": self.total,
                "dropped_bytes": self.dropped,
                "state": "running" if self.running else "exited",
                **({} if self.running else {"exit_code": exit_code(self.process), "timed_out": False}),
            }


class TwinRunner:
    """One sandbox's tools."""

    def __init__(self, workspace: Path, env: Mapping[str, str]) -> None:
        self.workspace = workspace
        self.env = {"PATH": os.environ["PATH"], **env}
        self.jobs: dict[str, TwinJob] = {}
        self.by_key: dict[str, Json] = {}
        self.runs = 0
        self.job_buffer_bytes = 8 * 1024 * 1024
        self.read_limit = 524_288
        self.list_limit = 1000
        self.drafts: dict[str, bytearray] = {}

    def call(self, tool: str, asked: Json) -> Json:
        """Answer a call as an MCP tool result."""
        doors: dict[str, Callable[[Json], Json]] = {
            "ash_exec": self._once(self.exec),
            "ash_job_start": self._once(self.job_start),
            "ash_job_read": self.job_read,
            "ash_job_write": self.job_write,
            "ash_job_signal": self.job_signal,
            "ash_job_list": self.job_list,
            "ash_file_read": self.file_read,
            "ash_file_write": self.file_write,
            "ash_file_list": self.file_list,
            "ash_file_stat": self.file_stat,
            "ash_file_mkdir": self.file_mkdir,
            "ash_file_move": self.file_move,
            "ash_file_remove": self.file_remove,
        }
        try:
            shape = doors[tool](asked)
        except Refused as exc:
            return _refusal(exc.kind, exc.message)
        except FileNotFoundError as exc:
            return _refusal("file_not_found", f"no such file: {exc.filename}")
        except IsADirectoryError as exc:
            return _refusal("is_a_directory", f"is a directory: {exc.filename}")
        except NotADirectoryError as exc:
            return _refusal("not_a_directory", f"not a directory: {exc.filename}")
        except FileExistsError as exc:
            return _refusal("file_exists", f"exists: {exc.filename}")
        return {"content": [{"type": "text", "text": "done"}], "structuredContent": shape, "isError": False}

    def close(self) -> None:
        for job in self.jobs.values():
            if job.running:
                os.killpg(job.process.pid, signal.SIGKILL)

    def _once(self, do: Callable[[Json], Json]) -> Callable[[Json], Json]:
        def door(asked: Json) -> Json:
            key = asked.pop("key", None)
            if key is None or key not in self.by_key:
                self.runs += 1
                answer = do(asked)
                if key is None:
                    return answer
                self.by_key[key] = answer
            return self.by_key[key]

        return door

    def _start(self, asked: Json, stdin: int) -> subprocess.Popen[bytes]:
        command = asked["command"]
        words: list[str] = ["bash", "-c", command] if isinstance(command, str) else command
        try:
            return subprocess.Popen(
                words,
                cwd=self.workspace / asked.get("cwd", "."),
                env=self.env | asked.get("env", {}),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as exc:
            raise Refused("spawn_failed", f"cannot start {words[0]}: {exc.strerror}") from exc

    def exec(self, asked: Json) -> Json:
        given = base64.b64decode(asked["stdin_base64"]) if "stdin_base64" in asked else None
        process = self._start(asked, subprocess.DEVNULL if given is None else subprocess.PIPE)
        began, timed_out = time.monotonic(), False
        try:
            out, err = process.communicate(given, timeout=asked.get("timeout_seconds", 60))
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        limit = asked.get("output_limit", 262_144)
        shape: Json = {
            "exit_code": exit_code(process),
            "duration_seconds": time.monotonic() - began,
            "timed_out": timed_out,
            "truncated": len(out) > limit or len(err) > limit,
        }
        for name, data in (("stdout", out), ("stderr", err)):
            kept = data[:limit]
            shape[name] = kept.decode("utf-8", "replace")
            shape[f"{name}_bytes"] = len(data)
            if shape[name].encode() != kept:
                shape[f"{name}_base64"] = base64.b64encode(kept).decode()
        if shape["truncated"]:
            with tempfile.NamedTemporaryFile(dir=self.workspace, suffix=".out", delete=False) as file:
                file.write(out)
            shape["output_file"] = file.name
        return shape

    def job_start(self, asked: Json) -> Json:
        process = self._start(asked, subprocess.PIPE if asked.get("stdin") else subprocess.DEVNULL)
        name = f"j{len(self.jobs) + 1}"
        self.jobs[name] = TwinJob(process, str(asked["command"]), self.job_buffer_bytes)
        return {"job": name, "started": True}

    def _job(self, asked: Json) -> TwinJob:
        try:
            return self.jobs[asked["job"]]
        except KeyError:
            raise Refused("job_not_found", f"there is no job {asked['job']!r}") from None

    def job_read(self, asked: Json) -> Json:
        return self._job(asked).read(asked["offset"], asked["limit"], asked["wait_seconds"])

    def job_write(self, asked: Json) -> Json:
        pipe = self._job(asked).process.stdin
        if pipe is None:
            raise Refused("bad_request", "the job was started without stdin")
        data = base64.b64decode(asked.get("data_base64", ""))
        pipe.write(data)
        pipe.flush()
        if asked.get("eof"):
            pipe.close()
        return {"written": len(data)}

    def job_signal(self, asked: Json) -> Json:
        job = self._job(asked)
        if job.running:
            os.killpg(job.process.pid, getattr(signal, f"SIG{asked['signal']}"))
        return {"signalled": job.running}

    def job_list(self, asked: Json) -> Json:
        return {
            "jobs": [
                {"job": name, "command": job.command, "state": "running" if job.running else "exited"}
                for name, job in self.jobs.items()
            ]
        }

    def file_read(self, asked: Json) -> Json:
        data = (self.workspace / asked["path"]).read_bytes()
        end = asked["offset"] + min(asked["limit"], self.read_limit)
        piece = data[asked["offset"] : end]
        return {"data_base64": base64.b64encode(piece).decode(), "size": len(data), "eof": end >= len(data)}

    def file_write(self, asked: Json) -> Json:
        path = self.workspace / asked["path"]
        draft = self.drafts.setdefault(asked["key"], bytearray())
        data = base64.b64decode(asked["data_base64"])
        draft[asked["offset"] :] = data
        if asked.get("end") is not None:
            del self.drafts[asked["key"]]
        if asked.get("end") == "commit":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draft)
        if "mode" in asked and path.exists():
            path.chmod(asked["mode"])
        return {"bytes": len(data), "size": len(draft)}

    def file_list(self, asked: Json) -> Json:
        found = sorted((self.workspace / asked.get("path", ".")).iterdir())
        left = [path for path in found if path.name > asked.get("cursor", "")]
        page = left[: self.list_limit]
        more = {"next_cursor": page[-1].name} if len(left) > len(page) else {}
        return {"entries": [_entry(path) for path in page], "truncated": bool(more), **more}

    def file_stat(self, asked: Json) -> Json:
        return {**_entry(self.workspace / asked["path"]), "path": asked["path"]}

    def file_mkdir(self, asked: Json) -> Json:
        parents = asked.get("parents", True)
        (self.workspace / asked["path"]).mkdir(parents=parents, exist_ok=parents)
        return {"path": asked["path"]}

    def file_move(self, asked: Json) -> Json:
        (self.workspace / asked["source"]).rename(self.workspace / asked["destination"])
        return {"path": asked["destination"]}

    def file_remove(self, asked: Json) -> Json:
        path = self.workspace / asked["path"]
        if not path.is_dir():
            path.unlink()
        elif asked.get("recursive"):
            subprocess.run(["rm", "-r", path], check=True)
        else:
            raise IsADirectoryError(21, "Is a directory", str(path))
        return {"removed": True}


def _entry(path: Path) -> Json:
    info = path.lstat()
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
    return {
        "name": path.name,
        "type": kinds.get(stat.S_IFMT(info.st_mode), "other"),
        "size": info.st_size,
        "mode": stat.S_IMODE(info.st_mode),
        "modified_at": info.st_mtime,
    }


def _refusal(kind: str, message: str) -> Json:
    return {
        "content": [{"type": "text", "text": message}],
        # What a subverted runner would add; nothing of it may be believed.
        "structuredContent": {
            "error": {"kind": kind, "message": message, "retryable": True, "trainable": False},
        },
        "isError": True,
    }
