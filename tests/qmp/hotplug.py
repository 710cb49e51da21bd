#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright The ecr Authors
"""Plug a disk in and out with QEMU's own QMP client library: hotplug.py SOCKET IMAGE

The machine has a bridge pci-bridge-0. Exits with 0 if it behaved as QEMU would.
"""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient


async def deleted(listener, device):
    """Wait until a device is gone."""
    async with asyncio.timeout(60):
        while True:
            event = await listener.get()
            if event["data"].get("device") == device:
                assert event["data"]["path"] == f"/machine/peripheral/{device}", event
                return


async def drive(socket, image):
    client = QMPClient("hotplug")
    listener = EventListener(names=["DEVICE_DELETED"])
    client.register_listener(listener)
    await client.connect(socket)
    node = {
        "driver": "raw",
        "node-name": "drive-0",
        "read-only": True,
        "file": {"driver": "file", "filename": image},
    }
    device = {
        "driver": "virtio-blk-pci",
        "id": "virtio-drive-0",
        "drive": "drive-0",
        "bus": "pci-bridge-0",
        "addr": "01",
        "share-rw": "on",
        "num-queues": "2",
    }
    for _ in range(5):
        await client.execute("blockdev-add", node)
        await client.execute("device_add", device)
        try:
            await client.execute("device_add", device)
            raise AssertionError("the same id twice")
        except ExecuteError as error:
            assert str(error) == "Duplicate device ID 'virtio-drive-0'", error
        await client.execute("device_del", {"id": "virtio-drive-0"})
        await deleted(listener, "virtio-drive-0")
        try:
            await client.execute("device_del", {"id": "virtio-drive-0"})
            raise AssertionError("gone and found")
        except ExecuteError as error:
            assert error.error_class == "DeviceNotFound", error
        await client.execute("blockdev-del", {"node-name": "drive-0"})
    await client.disconnect()


if __name__ == "__main__":
    asyncio.run(drive(sys.argv[1], sys.argv[2]))
