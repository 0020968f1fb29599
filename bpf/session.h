/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * The rules of a session that the kernel keeps: pycopy/session/ for the healthy
 * case, in C.  Like there, nothing here does any input or output: a segment
 * arrives, the session changes, and a verdict says what is to be done.  Whatever
 * is not the healthy case leaves: user space fetches the session and goes on
 * from exactly here, so nothing may be changed before it is decided to stay.
 *
 * Here: what may leave, and when.  stream.h takes in a client's segment, arrival.h a response.
 *
 * Runs under the session's spin lock: no helper may be called.
 */
#ifndef PYCOPY_SESSION_H
#define PYCOPY_SESSION_H

#include "parse.h"

enum pycopy_verdict {
	PYCOPY_SEND,	  /* pass it on now */
	PYCOPY_HOLD,	  /* its place in the log is remembered */
	PYCOPY_STEERED,	  /* it carried nothing to pass on */
	PYCOPY_DUPLICATE, /* nothing new in it */
	PYCOPY_LEAVE,	  /* not the kernel's business: see session->left */
};

/* What is sent: the session's numbers at the moment of the decision. */
struct pycopy_reply {
	__u32 seq;
	__u32 ack;
	__u32 ts_recent;
	__u8 flags;
	__u8 options;
	__u8 rcv_wscale;
	__u8 family;
	__u16 mss;
};

/* A client segment as the send rules see it: on arrival, or out of the log. */
struct pycopy_offer {
	__u32 end; /* seq of what follows */
	__u32 ack;
	__u32 need; /* bytes of the online response that the client had received: ack less irs */
	__u32 seg_len;
	__u32 fin;
	__u32 boundary;	   /* a request begins with it */
	__u32 overlapping; /* and requests do not wait for the answers to those before */
};

static __always_inline int pycopy_leave(struct pycopy_session *s, u16 why)
{
	s->owner = PYCOPY_LEAVING;
	s->left = why;
	return PYCOPY_LEAVE;
}

static __always_inline u32 pycopy_in_flight(const struct pycopy_session *s)
{
	return s->snd_nxt - s->snd_una;
}

/* How many bytes the target still owes before this may leave (release.py rule 1);
 * negative: it has said more than the client had received online.
 */
static __always_inline s32 pycopy_owed(const struct pycopy_session *s, u32 need)
{
	return (need - s->need_base) - (s->rcv_nxt - s->irs);
}

/* A request that the count lets go, though the one before is not answered yet
 * (release.asks_ahead).
 */
static __always_inline int pycopy_asks_ahead(const struct pycopy_session *s,
					     const struct pycopy_offer *offer)
{
	s32 ahead = (offer->need - s->need_base) - (s->said_before - s->irs);

	return offer->boundary && offer->seg_len && s->known & PYCOPY_KNOWN_SENT &&
	       !offer->overlapping && (s32)(s->rcv_nxt - s->said_before) <= 0 && ahead < 0;
}

/* SEND, HOLD, or LEAVE: whether the next segment in order may leave. */
static __always_inline int pycopy_may_send(struct pycopy_session *s,
					   const struct pycopy_fast_config *config,
					   const struct pycopy_offer *offer)
{
	s32 owed = pycopy_owed(s, offer->need);
	s64 room = (s64)s->snd_wnd - pycopy_in_flight(s);
	s64 cwnd_room = (s64)s->cwnd - pycopy_in_flight(s);

	if (s->state == PYCOPY_SYN_SENT)
		return PYCOPY_HOLD;
	if (s->state == PYCOPY_CLOSE_WAIT) {
		/* The target is over.  More than a close needs another connection, or the
		 * half that is open: departure.py knows which.
		 */
		if (offer->seg_len)
			return pycopy_leave(s, PYCOPY_LEFT_CLOSE);
	} else if (config->wait_for_response) {
		if (owed > 0)
			return PYCOPY_HOLD;
		/* A close waits for quiet where the target has said more, or may have more to
		 * say than it is counted to owe (release.py).
		 */
		if ((owed < 0 && !offer->seg_len) || (offer->fin && s->known & PYCOPY_KNOWN_DOUBT))
			return pycopy_leave(s, PYCOPY_LEFT_CLOSE);
		if (pycopy_asks_ahead(s, offer))
			return PYCOPY_HOLD;
	}
	/* A super-segment leaves whole: beyond the congestion window if need be, beyond the
	 * target's own never.
	 */
	if (cwnd_room < room && (offer->seg_len <= s->smss || cwnd_room <= 0))
		room = cwnd_room;
	if (offer->seg_len > room || room < 0) {
		if (pycopy_in_flight(s))
			return PYCOPY_HOLD;		   /* acknowledgements are coming */
		return pycopy_leave(s, PYCOPY_LEFT_QUEUE); /* a window to be probed */
	}
	return PYCOPY_SEND;
}

/* It leaves now. */
static __always_inline void pycopy_sent(struct pycopy_session *s, const struct pycopy_offer *offer,
					u64 now_ns)
{
	if (offer->boundary) {
		s->answered = s->said_before = s->rcv_nxt;
		s->asked = offer->end;
	}
	s->sent_need = offer->ack;
	s->known |= PYCOPY_KNOWN_SENT;
	if (!pycopy_in_flight(s))
		s->rto_at = now_ns + s->rto_ns;
	if (!(s->known & PYCOPY_KNOWN_TIME)) {
		s->known |= PYCOPY_KNOWN_TIME;
		s->timed_end = offer->end;
		s->timed_ns = now_ns;
	}
	s->snd_nxt = offer->end;
	s->rcv_acked = s->rcv_nxt;
	s->ack_at = 0;
	if (offer->fin)
		s->state = pycopy_next_state(s->state, PYCOPY_EVENT_FIN_SENT);
}

/* An acknowledgement of its own, if one is due: true if it is to be sent. */
static __always_inline int pycopy_acknowledge(struct pycopy_session *s, u64 now_ns)
{
	if (!s->ack_at || s->ack_at > now_ns)
		return 0;
	/* receiving.acknowledge() */
	if (s->ack_at != PYCOPY_AT_ONCE && s->rcv_nxt - s->rcv_acked >= 2 * (u32)s->smss)
		s->stretch = -PYCOPY_STRETCH_PAUSE;
	s->ack_at = 0;
	s->rcv_acked = s->rcv_nxt;
	return 1;
}

/* A piece of the oldest held segment, as much as one frame takes, if it may leave now:
 * SEND, and from where in its payload.
 */
static __always_inline int pycopy_release(struct pycopy_session *s,
					  const struct pycopy_fast_config *config,
					  const struct pycopy_log_record *record, u64 now_ns,
					  u32 *from, u32 *bytes)
{
	u32 left = record->seg_len - s->held_sent, frame = s->smss;
	struct pycopy_offer offer = {.ack = record->ack};
	int verdict;

	if (frame > PYCOPY_RELEASE_BYTES)
		frame = PYCOPY_RELEASE_BYTES;
	/* Sums are made of whole words. */
	offer.seg_len = left > frame ? frame & ~3 : left;
	offer.end = record->seq + s->held_sent + offer.seg_len;
	if (offer.seg_len == left) {
		offer.fin = record->end - offer.end;
		offer.end = record->end;
	}
	offer.boundary = record->tcp_flags & PYCOPY_LOG_BOUNDARY && !s->held_sent;
	if (s->known & PYCOPY_KNOWN_SENT && (s32)(offer.ack - s->sent_need) < 0)
		offer.ack = s->sent_need; /* it was overtaken */
	offer.need = offer.ack - s->online_irs;
	offer.overlapping = s->known & PYCOPY_KNOWN_OVERLAP;
	verdict = pycopy_may_send(s, config, &offer);
	if (verdict != PYCOPY_SEND)
		return verdict;
	*from = s->held_sent;
	*bytes = offer.seg_len;
	s->held_sent += offer.seg_len;
	if (offer.end == record->end) {
		s->held--;
		s->held_at = record->next;
		s->held_sent = 0;
	}
	pycopy_sent(s, &offer, now_ns);
	return PYCOPY_SEND;
}

static __always_inline void pycopy_reply_of(const struct pycopy_session *s, u32 seq, u8 flags,
					    struct pycopy_reply *reply)
{
	reply->seq = seq;
	reply->ack = s->rcv_nxt;
	reply->ts_recent = s->ts_recent;
	reply->mss = s->mss;
	reply->flags = flags;
	reply->options = s->options;
	reply->rcv_wscale = s->rcv_wscale;
	reply->family = s->family;
}

#endif
