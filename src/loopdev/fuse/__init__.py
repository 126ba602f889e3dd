# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""One regular file, served to the kernel as the root of a FUSE mount."""
