/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * The rules of a session that the kernel keeps: pycopy/session/ for the healthy
 * case, in C.  Like there, nothing here does any input or output: a segment
 * arrives, the session changes, and a verdict says what is to be done.  Whatever
 * is not the healthy case leaves: user space fetches the session and goes on
 * from exactly here, so nothing may be changed before it is decided to stay.
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

static __always_inline int pycopy_leave(struct pycopy_session *s, u16 why)
{
	s->owner = PYCOPY_LEAVING;
	s->left = why;
	return PYCOPY_LEAVE;
}

/* What a SYN without the option means. */
static __always_inline u32 pycopy_default_mss(u8 family)
{
	return family == 4 ? PYCOPY_DEFAULT_MSS_IPV4 : PYCOPY_DEFAULT_MSS_IPV6;
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
			return PYCOPY_HOLD; /* acknowledgements are coming */
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
	offer->boundary = !(s->known & PYCOPY_KNOWN_NEED) ||
			  (s32)(offer->ack - s->online_need) > 0;
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

/* recovery.sample_rtt(): RFC 6298 2. */
static __always_inline void pycopy_sample_rtt(struct pycopy_session *s,
					      const struct pycopy_fast_config *config, s64 rtt_ns)
{
	s64 off = (s64)s->srtt_ns - rtt_ns;
	u64 rto_ns;

	if (!s->srtt_ns) {
		s->srtt_ns = rtt_ns;
		s->rttvar_ns = (u64)rtt_ns / 2;
	} else {
		if (off < 0)
			off = -off;
		s->rttvar_ns += (off - (s64)s->rttvar_ns) >> 2;
		s->srtt_ns += (rtt_ns - (s64)s->srtt_ns) >> 3;
	}
	rto_ns = s->srtt_ns + 4 * s->rttvar_ns;
	if (rto_ns < config->rto_min_ns)
		rto_ns = config->rto_min_ns;
	if (rto_ns > config->rto_max_ns)
		rto_ns = config->rto_max_ns;
	s->rto_ns = rto_ns;
}

/* recovery.on_new_ack() where nothing was lost: RFC 5681 3.1, RFC 7661. */
static __always_inline void pycopy_grow_cwnd(struct pycopy_session *s, u32 acked_bytes)
{
	u64 grown = acked_bytes;

	if (2 * (u64)(pycopy_in_flight(s) + acked_bytes) < s->cwnd)
		return;
	if (s->cwnd < s->ssthresh) {
		if (grown > 2 * s->smss)
			grown = 2 * s->smss;
	} else {
		grown = (u64)s->smss * acked_bytes / (s->cwnd ? s->cwnd : 1);
		if (!grown)
			grown = 1;
	}
	if (s->cwnd < PYCOPY_NO_SSTHRESH)
		s->cwnd += grown;
}

/* The target acknowledged everything before `ack`: arrival._advance(). */
static __always_inline void pycopy_acknowledged(struct pycopy_session *s,
						const struct pycopy_fast_config *config, u32 ack,
						u64 now_ns)
{
	u32 acked_bytes = ack - s->snd_una;

	s->snd_una = ack;
	if (s->known & PYCOPY_KNOWN_TIME && (s32)(ack - s->timed_end) >= 0) {
		s->known &= ~PYCOPY_KNOWN_TIME;
		pycopy_sample_rtt(s, config, now_ns > s->timed_ns ? now_ns - s->timed_ns : 1);
	}
	pycopy_grow_cwnd(s, acked_bytes);
	s->progress_ns = now_ns;
	s->rto_at = pycopy_in_flight(s) ? now_ns + s->rto_ns : 0;
}

/* arrival._establish() */
static __always_inline int pycopy_establish(struct pycopy_session *s,
					    const struct pycopy_fast_config *config,
					    const struct pycopy_segment *segment, u64 now_ns)
{
	const u8 wanted = PYCOPY_TCP_SYN | PYCOPY_TCP_ACK;
	u32 mss = segment->mss ? segment->mss : pycopy_default_mss(s->family);

	if ((segment->tcp_flags & (wanted | PYCOPY_TCP_RST | PYCOPY_TCP_FIN)) != wanted ||
	    segment->ack != s->snd_nxt || segment->seg_len)
		return pycopy_leave(s, PYCOPY_LEFT_RESPONSE);
	s->irs = segment->seq;
	s->rcv_nxt = s->rcv_acked = s->answered = segment->seq + 1;
	s->rcv_acked--;
	s->options &= segment->options;
	if (s->options & PYCOPY_OPT_WSCALE)
		s->snd_wscale = segment->wscale;
	else
		s->rcv_wscale = 0;
	if (mss < PYCOPY_MIN_MSS)
		mss = PYCOPY_MIN_MSS;
	if (mss < s->mss)
		s->mss = mss;
	s->smss = s->mss;
	if (s->options & PYCOPY_OPT_TIMESTAMPS)
		s->smss -= PYCOPY_TIMESTAMPS_BYTES;
	s->ts_recent = segment->tsval;
	pycopy_acknowledged(s, config, segment->ack, now_ns);
	s->cwnd = PYCOPY_INITIAL_WINDOW * s->smss;
	s->ssthresh = PYCOPY_NO_SSTHRESH;
	s->snd_wnd = segment->wnd; /* RFC 7323 2.2: never scaled in a SYN */
	s->snd_wl1 = segment->seq;
	s->snd_wl2 = segment->ack;
	s->state = pycopy_next_state(s->state, PYCOPY_EVENT_SYN_ACK);
	s->ack_at = PYCOPY_AT_ONCE;
	return PYCOPY_STEERED;
}

/* Ours or the target's FIN is acknowledged or in order: with both, late segments are waited for. */
static __always_inline void pycopy_move(struct pycopy_session *s, enum pycopy_event event,
					const struct pycopy_fast_config *config, u64 now_ns)
{
	u8 state = pycopy_next_state(s->state, event);

	if (state == PYCOPY_TIME_WAIT)
		s->rto_at = now_ns + config->time_wait_ns;
	s->state = state;
}

/* Late segments of a session that is over: a repeated FIN is acknowledged again. */
static __always_inline int pycopy_after_the_end(struct pycopy_session *s,
						const struct pycopy_segment *segment)
{
	if (segment->seg_len || segment->tcp_flags & PYCOPY_TCP_FIN)
		s->ack_at = PYCOPY_AT_ONCE;
	return PYCOPY_DUPLICATE;
}

/* receiving.must_ack_now() */
static __always_inline int pycopy_must_ack_now(struct pycopy_session *s, u32 fin, u32 pushed)
{
	u32 unacked = s->rcv_nxt - s->rcv_acked, segments;

	if (fin)
		return 1;
	if (unacked < 2 * (u32)s->smss)
		return 0;
	segments = (unacked + s->smss - 1) / (s->smss ? s->smss : 1);
	if (segments > PYCOPY_STRETCH_MAX)
		segments = PYCOPY_STRETCH_MAX;
	if (s->stretch < 0)
		s->stretch++;
	else if ((s32)segments > s->stretch)
		s->stretch = segments;
	else
		return !pushed;
	return 1;
}

/* session.on_target_segment(): STEERED, DUPLICATE or LEAVE.  What it sets free is
 * found afterwards; an acknowledgement is due when ack_at says so.
 */
static __always_inline int pycopy_target_arrives(struct pycopy_session *s,
						 const struct pycopy_fast_config *config,
						 const struct pycopy_segment *segment, u64 now_ns)
{
	u32 fin = !!(segment->tcp_flags & PYCOPY_TCP_FIN);
	u32 end = segment->seq + segment->seg_len + fin;
	s32 ahead = segment->seq - s->rcv_nxt;
	s32 acked = segment->ack - s->snd_una;
	u32 wnd = (u32)segment->wnd << (s->snd_wscale & 15);
	u8 was;

	if (s->state == PYCOPY_SYN_SENT)
		return pycopy_establish(s, config, segment, now_ns);
	if (s->state == PYCOPY_TIME_WAIT)
		return pycopy_after_the_end(s, segment);
	if (segment->tcp_flags & PYCOPY_TCP_RST)
		return pycopy_leave(s, PYCOPY_LEFT_RESET);
	if (segment->tcp_flags & PYCOPY_TCP_SYN) {
		s->ack_at = PYCOPY_AT_ONCE; /* our ACK of the handshake was lost, or RFC 5961 4 */
		return PYCOPY_DUPLICATE;
	}
	if (segment->sack_blocks)
		return pycopy_leave(s, PYCOPY_LEFT_DUP_ACK);
	if (!(segment->tcp_flags & PYCOPY_TCP_ACK) || (s32)(segment->ack - s->snd_nxt) > 0 ||
	    (end != segment->seq && ahead > 0))
		return pycopy_leave(s, PYCOPY_LEFT_RESPONSE);
	if (!acked && pycopy_in_flight(s) && end == segment->seq && wnd == s->snd_wnd)
		return pycopy_leave(s, PYCOPY_LEFT_DUP_ACK);

	if (acked >= 0) {
		if (acked) {
			pycopy_acknowledged(s, config, segment->ack, now_ns);
			was = s->state;
			if (!pycopy_in_flight(s) && s->known & PYCOPY_KNOWN_FIN)
				pycopy_move(s, PYCOPY_EVENT_FIN_ACKED, config, now_ns);
			/* RFC 9293 3.10.7.4: the end, whatever else is in the segment. */
			if (was == PYCOPY_LAST_ACK && s->state == PYCOPY_TIME_WAIT) {
				s->ack_at = 0;
				return PYCOPY_STEERED;
			}
		}
		/* RFC 9293 3.10.7.4: only a segment that is not older may change the window. */
		if ((s32)(segment->seq - s->snd_wl1) > 0 ||
		    (segment->seq == s->snd_wl1 && (s32)(segment->ack - s->snd_wl2) >= 0)) {
			s->snd_wnd = wnd;
			s->snd_wl1 = segment->seq;
			s->snd_wl2 = s->snd_una;
		}
	}
	if ((s32)(segment->seq - s->rcv_acked) <= 0 && (s32)(segment->tsval - s->ts_recent) > 0)
		s->ts_recent = segment->tsval; /* RFC 7323 4.3 */
	if (end == segment->seq) {
		if (ahead < 0)
			s->ack_at = PYCOPY_AT_ONCE; /* keep-alive (RFC 9293 3.8.4), or window probe */
		return PYCOPY_STEERED;
	}
	if (!PYCOPY_MAY_RECEIVE(s->state) ||
	    (s32)(end - s->rcv_nxt) <= 0) {
		s->ack_at = PYCOPY_AT_ONCE; /* repeated: our ACK was lost */
		return PYCOPY_DUPLICATE;
	}
	s->rcv_nxt = end;
	if (s->known & PYCOPY_KNOWN_SENT && (s32)(s->snd_una - s->asked) < 0)
		s->said_before = end; /* an answer to those before */
	s->progress_ns = now_ns;
	if (pycopy_must_ack_now(s, fin, segment->tcp_flags & PYCOPY_TCP_PSH))
		s->ack_at = PYCOPY_AT_ONCE;
	else if (!s->ack_at)
		s->ack_at = now_ns + config->delayed_ack_ns;
	if (fin)
		pycopy_move(s, PYCOPY_EVENT_FIN_RECEIVED, config, now_ns);
	return PYCOPY_STEERED;
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
