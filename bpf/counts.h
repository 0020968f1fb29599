/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * What the kernel's sessions count (enum pycopy_fast_count): a client segment taken in, a
 * response, a frame sent, how long one was held.  The words are those of pycopy/session/fates.py.
 */
#ifndef PYCOPY_COUNTS_H
#define PYCOPY_COUNTS_H

#include "maps.h"
#include "session.h"

/* A client segment that a session has taken in. */
static __always_inline void pycopy_count_client(u64 *counts, u32 payload_bytes, int verdict)
{
	counts[PYCOPY_FAST_CLIENT]++;
	if (payload_bytes) {
		counts[PYCOPY_FAST_PAYLOAD]++;
		counts[PYCOPY_FAST_PAYLOAD_BYTES] += payload_bytes;
	}
	if (verdict == PYCOPY_SEND) {
		counts[PYCOPY_FAST_SENT_AT_ONCE]++;
		counts[PYCOPY_FAST_HOLD_TIME]++;
	} else if (verdict == PYCOPY_HOLD) {
		counts[PYCOPY_FAST_HELD]++;
	} else if (verdict == PYCOPY_STEERED) {
		counts[PYCOPY_FAST_STEERED]++;
	} else {
		counts[PYCOPY_FAST_DUPLICATE]++;
	}
}

/* A SYN: it opened a session, or repeats the one that did. */
static __always_inline void pycopy_count_syn(u64 *counts, enum pycopy_fast_count became)
{
	counts[PYCOPY_FAST_CLIENT]++;
	counts[PYCOPY_FAST_SYN]++;
	counts[became]++;
}

/* A response that a session has taken in. */
static __always_inline void pycopy_count_response(u64 *counts, const struct pycopy_segment *segment,
						  int verdict)
{
	counts[PYCOPY_FAST_RESPONSES]++;
	counts[verdict == PYCOPY_STEERED ? PYCOPY_FAST_RESPONSES_STEERED
					 : PYCOPY_FAST_RESPONSES_DUPLICATE]++;
	if (segment->seg_len)
		counts[PYCOPY_FAST_RESPONSE_PAYLOAD]++;
	if (segment->tcp_flags & PYCOPY_TCP_FIN)
		counts[PYCOPY_FAST_RESPONSE_FIN]++;
}

/* A frame to the target, or one that its device did not take. */
static __always_inline void pycopy_count_out(u64 *counts, u8 flags, u32 payload, long failed)
{
	if (failed) {
		counts[PYCOPY_FAST_OUT_FAILED]++;
		return;
	}
	counts[PYCOPY_FAST_OUT_SEGMENTS]++;
	if (payload)
		counts[PYCOPY_FAST_OUT_PAYLOAD]++;
	else if (!(flags & (PYCOPY_TCP_SYN | PYCOPY_TCP_FIN)))
		counts[PYCOPY_FAST_OUT_ACK]++;
	if (flags & PYCOPY_TCP_SYN)
		counts[PYCOPY_FAST_OUT_SYN]++;
	if (flags & PYCOPY_TCP_FIN)
		counts[PYCOPY_FAST_OUT_FIN]++;
}

/* Tallies.held_for() */
static __always_inline void pycopy_count_hold(u64 *counts, u64 hold_ns)
{
	u32 bucket = 0;

#define PYCOPY_REACHES(bound_ns) bucket += hold_ns >= (bound_ns);
	PYCOPY_HOLD_BOUNDS_NS(PYCOPY_REACHES)
#undef PYCOPY_REACHES
	if (bucket < PYCOPY_HOLD_BUCKETS)
		counts[PYCOPY_FAST_HOLD_TIME + bucket]++;
}

#endif
