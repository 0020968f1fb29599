/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * Sessions that never leave the kernel: what capture.c does with a client segment,
 * and intercept.c with a response, before either becomes a record for user space.
 *
 *	client segment ── log.h: written down ── session.h: now, later, not ours
 *	                                           │ now
 *	response ── session.h: what it sets free ──┴─ emit.h ──▶ target
 *
 * keep.h takes both in, open.h begins a session, pump.h sends what is set free, counts.h
 * counts.  Whatever these do not take goes to user space as if they did not exist; if it was a
 * session of the kernel's, the session goes with it.  Here: whose a session is.
 */
#ifndef PYCOPY_FASTPATH_H
#define PYCOPY_FASTPATH_H

#include "emit.h"

/* What became of a segment. */
enum pycopy_kept {
	PYCOPY_TO_USER = 0,
	PYCOPY_TO_SESSION, /* the same, of a session that user space has or is about to get */
	PYCOPY_KEPT,	   /* dealt with here */
	PYCOPY_IDLE_ACK,   /* an acknowledgement that nobody needs */
	PYCOPY_GONE_OUT,   /* the packet has become a frame to the target: redirect it */
};

/* Another CPU's packet may have come after `now_ns` was read. */
static __always_inline u64 pycopy_since(u64 then_ns, u64 now_ns)
{
	return now_ns > then_ns ? now_ns - then_ns : 0;
}

static __always_inline int pycopy_is_ours(const struct pycopy_session *s,
					  const struct pycopy_flow *flow)
{
	return s->generation == flow->generation && s->owner == PYCOPY_KERNEL;
}

/* The session is user space's from here on: tell it, and count why. */
static __always_inline void pycopy_hand_over(struct pycopy_session *s,
					     const struct pycopy_flow *flow, u64 *counts)
{
	u32 left = s->left;

	if (left < PYCOPY_LEFT_REASONS)
		counts[PYCOPY_FAST_LEFT + left]++;
	pycopy_watch(flow->slot);
}

/* The session leaves for a reason that lies outside of session.h. */
static __always_inline int pycopy_expel(struct pycopy_session *s, const struct pycopy_flow *flow,
					u64 *counts, u16 why)
{
	int left = 0;

	bpf_spin_lock(&s->lock);
	if (pycopy_is_ours(s, flow) && s->state != PYCOPY_TIME_WAIT)
		left = pycopy_leave(s, why);
	bpf_spin_unlock(&s->lock);
	if (left)
		pycopy_hand_over(s, flow, counts);
	return PYCOPY_TO_SESSION;
}

/* The session is over and only lingered: nothing of it is left but the slot, which is the
 * caller's to push.  Zero: it is not so any more.
 */
static __always_inline int pycopy_free_lingering(struct pycopy_session *s,
						 const struct pycopy_flow *flow)
{
	int gone = 0;

	bpf_spin_lock(&s->lock);
	if (pycopy_is_ours(s, flow) && s->state == PYCOPY_TIME_WAIT) {
		s->owner = PYCOPY_FREE;
		s->generation++;
		gone = 1;
	}
	bpf_spin_unlock(&s->lock);
	return gone;
}

#endif
