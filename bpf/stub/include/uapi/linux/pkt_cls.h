/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0 */
/* Verdicts of a TC program (tc-bpf(8)). */
#ifndef PYCOPY_STUB_PKT_CLS_H
#define PYCOPY_STUB_PKT_CLS_H

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_OK 0
#define TC_ACT_SHOT 2
#define TC_ACT_STOLEN 4
#define TC_ACT_REDIRECT 7

#endif
