# SPDX-License-Identifier: Apache-2.0
"""The main job on a real VM, step by step: ``make demo``."""
