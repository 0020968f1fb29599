/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * What differs between the two hooks, TC and XDP.  An object is compiled for one of them
 * (PYCOPY_HOOK_XDP) and for one kind of link (PYCOPY_L2_BYTES: 14, or 0 on bare IP).
 */
#ifndef PYCOPY_HOOK_H
#define PYCOPY_HOOK_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#if PYCOPY_HOOK_XDP
#define PYCOPY_CTX		struct xdp_md
#define PYCOPY_LOAD_BYTES	bpf_xdp_load_bytes
#define PYCOPY_FRAME_BYTES(ctx) ((u32)bpf_xdp_get_buff_len(ctx))
#define PYCOPY_CONTINUE		XDP_PASS
#else
#define PYCOPY_CTX		struct __sk_buff
#define PYCOPY_LOAD_BYTES	bpf_skb_load_bytes
#define PYCOPY_FRAME_BYTES(ctx) ((ctx)->len)
#define PYCOPY_CONTINUE		TC_ACT_UNSPEC /* the next program's turn */
#endif

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

/* clang otherwise folds a length, or a loop's counter, into another form whose
 * bounds the verifier cannot follow: pin it to a register, then test it.
 */
#define PYCOPY_PIN(value) asm volatile("" : "+r"(value))

/* A value from memory as if somebody might have changed it: the verifier forgets what it knew of
 * it.  Else it would go through all that follows once for each way out of a loop that has told
 * the value's range.
 */
#define PYCOPY_FRESH(value) (*(volatile typeof(value) *)&(value))

/* Whether lo <= *value <= hi, said so that every verifier believes it.  A comparison with two
 * bounds becomes one of `value - lo` in clang's hands, and older verifiers learn nothing of a
 * value from its difference (nor Linux 6.1 from `!= 0`): so the difference is what is made, and
 * the value is made of that.
 */
static __always_inline int pycopy_within(u64 *value, const u64 lo, const u64 hi)
{
	u64 above = *value - lo;

	PYCOPY_PIN(above);
	if (above > hi - lo)
		return 0;
	PYCOPY_PIN(above);
	*value = above + lo;
	return 1;
}

#endif
