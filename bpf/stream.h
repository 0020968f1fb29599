/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * A segment of the client comes to a session that the kernel keeps: the healthy case of
 * session.on_client_segment() and pycopy/session/stream.py.  Under the session's lock.
 */
#ifndef PYCOPY_STREAM_H
#define PYCOPY_STREAM_H

#include "session.h"

/* What a client's segment makes of the session's knowledge of its client.  Written only when
 * it is decided that the session stays: else user space reads the same segment anew, with the
 * session as it was before.
 */
struct pycopy_heard {
	__u64 asked_ns;
	__u64 client_rtt_ns;
	__u32 online_irs;
	__u32 online_rcv_nxt;
	__u32 known;
};

/* What the client's acknowledgement says.  Zero: it lies before all that the online server
 * ever sent.
 */
static __always_inline int pycopy_hear(const struct pycopy_session *s,
				       const struct pycopy_segment *segment, u64 now_ns,
				       struct pycopy_heard *heard)
{
	s32 news = segment->ack - s->online_rcv_nxt;

	heard->asked_ns = s->asked_ns;
	heard->client_rtt_ns = s->client_rtt_ns;
	heard->online_irs = s->online_irs;
	heard->online_rcv_nxt = s->online_rcv_nxt;
	heard->known = s->known;
	if (!(s->known & PYCOPY_KNOWN_IRS)) {
		if (!segment->seg_len)
			heard->client_rtt_ns = now_ns - s->asked_ns;
		heard->known |= PYCOPY_KNOWN_IRS;
		heard->online_irs = segment->ack - 1;
		heard->online_rcv_nxt = segment->ack;
		return 1;
	}
	if (news > 0)
		heard->online_rcv_nxt = segment->ack;
	return (s64)(s->online_rcv_nxt - s->online_irs) + news >= 1;
}

/* The segment is the next one in order: stream._append(). */
static __always_inline void pycopy_append(const struct pycopy_session *s, u64 now_ns,
					  struct pycopy_heard *heard, struct pycopy_offer *offer)
{
	/* An ACK never moves back: a segment that was overtaken has a lower one.  What the
	 * client had received since its segment before makes this one a new request.
	 */
	offer->boundary = !(s->known & PYCOPY_KNOWN_NEED) || (s32)(offer->ack - s->online_need) > 0;
	if (!offer->boundary)
		offer->ack = s->online_need;
	offer->need = offer->ack - heard->online_irs;
	heard->known |= PYCOPY_KNOWN_NEED | (offer->fin ? PYCOPY_KNOWN_FIN : 0);
	if (offer->boundary && offer->seg_len) {
		/* Sooner than an answer could come and a request go. */
		if (2 * (now_ns - s->asked_ns) < heard->client_rtt_ns)
			heard->known |= PYCOPY_KNOWN_OVERLAP;
		heard->asked_ns = now_ns;
	}
	offer->overlapping = heard->known & PYCOPY_KNOWN_OVERLAP;
}

/* The session stays: what has become of its client is written. */
static __always_inline void pycopy_note(struct pycopy_session *s, const struct pycopy_heard *heard,
					u64 now_ns)
{
	s->client_ns = now_ns;
	s->asked_ns = heard->asked_ns;
	s->client_rtt_ns = heard->client_rtt_ns;
	s->online_irs = heard->online_irs;
	s->online_rcv_nxt = heard->online_rcv_nxt;
	s->known = heard->known;
}

/* The last of the segments that are held. */
static __always_inline void pycopy_hold(struct pycopy_session *s, u64 at)
{
	if (!s->held) {
		s->held_at = at;
		s->held_sent = 0;
	}
	s->held++;
}

/* session.on_client_segment(): `at` is where the segment is in the log. */
static __always_inline int pycopy_client_arrives(struct pycopy_session *s,
						 const struct pycopy_fast_config *config,
						 const struct pycopy_segment *segment, u64 at,
						 u64 now_ns)
{
	struct pycopy_offer offer = {
		.seg_len = segment->seg_len,
		.fin = !!(segment->tcp_flags & PYCOPY_TCP_FIN),
		.ack = segment->ack,
	};
	struct pycopy_heard heard;
	int verdict;

	offer.end = segment->seq + offer.seg_len + offer.fin;
	if (segment->tcp_flags & PYCOPY_TCP_RST)
		return pycopy_leave(s, PYCOPY_LEFT_RESET);
	if (!(segment->tcp_flags & PYCOPY_TCP_ACK))
		return pycopy_leave(s, PYCOPY_LEFT_OPTIONS);
	if (!pycopy_hear(s, segment, now_ns, &heard))
		return pycopy_leave(s, PYCOPY_LEFT_ORDER);
	if (!(offer.seg_len + offer.fin)) {
		pycopy_note(s, &heard, now_ns);
		return PYCOPY_STEERED;
	}
	if (s->known & PYCOPY_KNOWN_FIN || (s32)(offer.end - s->online_snd_nxt) <= 0) {
		pycopy_note(s, &heard, now_ns);
		return PYCOPY_DUPLICATE;
	}
	if (segment->seq != s->online_snd_nxt)
		return pycopy_leave(s, PYCOPY_LEFT_ORDER);
	pycopy_append(s, now_ns, &heard, &offer);
	verdict = s->held ? PYCOPY_HOLD : pycopy_may_send(s, config, &offer);
	if (verdict == PYCOPY_LEAVE)
		return verdict;
	if (verdict == PYCOPY_HOLD && s->held >= PYCOPY_HELD_MAX)
		return pycopy_leave(s, PYCOPY_LEFT_QUEUE);
	/* Everything is decided: from here on it is written. */
	pycopy_note(s, &heard, now_ns);
	if (verdict == PYCOPY_HOLD)
		pycopy_hold(s, at);
	else
		pycopy_sent(s, &offer, now_ns);
	s->log_last = at;
	s->online_snd_nxt = offer.end;
	s->online_need = offer.ack;
	return verdict;
}

#endif
