# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Proxmox Backup: snapshots in a datastore.

blob, index, manifest, keys and names are the formats: bytes in, values out, and back.
"""
