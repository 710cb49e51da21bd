#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright The ecr Authors
"""Drive a VM with QEMU's own QMP client library: drive.py SOCKET

Looks at everything, stops and continues the guest, presses the power button, resets and ends the VM.
Exits with 0 if the VM behaved as QEMU would.
"""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient

QUERIES = """
    query-status query-version query-commands query-qmp-schema query-name query-uuid query-kvm
    query-machines query-cpus-fast query-memory-size-summary query-memory-devices query-chardev
    query-block query-pci query-iothreads
""".split()


async def expect(listener, name):
    """Wait for an event; others may come before it."""
    async with asyncio.timeout(30):
        while True:
            event = await listener.get()
            if event["event"] == name:
                return event


async def status(client):
    return (await client.execute("query-status"))["status"]


async def drive(socket):
    client = QMPClient("drive")
    listener = EventListener()
    client.register_listener(listener)
    await client.connect(socket)

    commands = {command["name"] for command in await client.execute("query-commands")}
    schema = {
        entity["name"]
        for entity in await client.execute("query-qmp-schema")
        if entity["meta-type"] == "command"
    }
    assert commands == schema, commands ^ schema
    for query in QUERIES:
        assert query in commands, query
        print(query, str(await client.execute(query))[:100])

    try:
        await client.execute("no-such-command")
        raise AssertionError("no-such-command was carried out")
    except ExecuteError as error:
        assert error.error_class == "CommandNotFound", error

    if await status(client) != "running":
        await client.execute("cont")
        await expect(listener, "RESUME")
    await client.execute("stop")
    await expect(listener, "STOP")
    assert await status(client) == "paused"
    await client.execute("cont")
    await expect(listener, "RESUME")
    assert await status(client) == "running"

    # A second client at the same time; it comes and goes.
    other = QMPClient("other")
    await other.connect(socket)
    await other.execute("query-name")
    await other.disconnect()

    await client.execute("system_powerdown")
    await expect(listener, "POWERDOWN")
    await client.execute("system_reset")
    await expect(listener, "RESET")
    await client.execute("quit")
    event = await expect(listener, "SHUTDOWN")
    assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}, event
    try:
        await client.disconnect()
    except EOFError:
        # The VM closed its end first.
        pass


if __name__ == "__main__":
    asyncio.run(drive(sys.argv[1]))
