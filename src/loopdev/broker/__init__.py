# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The broker: loop devices for processes that have no /dev and no privileges."""
