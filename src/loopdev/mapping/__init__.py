# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""An image as a loop device: image -> FUSE file -> /dev/loopN, and its life."""
