"""Text that breaks pages: every piece of it must be shown as itself, and none of it may act."""

from __future__ import annotations

HOSTILE = (
    "<s>",
    "</s>",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "&lt;",
    "\"double\" and 'single'",
    "\n",
    "\t",
    "",
    " ",
    "\u202eevil",
    "x" * 120,
    "שלום",
    "e\u0301\u0302",
    "\u0301",
    "\u200d",
    "\u3164",
    "😀",
    "$x$",
    "\ufffe",
    "</textarea></style></title>",
)
