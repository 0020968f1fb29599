/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * Frames to the target, made of the packet at hand (TC only).  Of a client's segment a
 * copy is sent: headers rewritten in place, cloned out, and put back as they were
 * before anybody else sees the packet.  Of a response, or of the timer's dummy, the
 * packet itself becomes the frame.  What the headers say is pycopy/wire/headers.py's and
 * rewrite.py's, option by option.
 *
 * Checksums: a captured one may be partial (veth, virtio, loopback): only the sum of
 * the pseudo-header stands in the field and the device adds the rest.  Nothing says
 * so, but bpf_l4_csum_replace() knows: what is no change of the pseudo-header it
 * leaves out where the sum is partial.  So both kinds are served by one call.
 */
#ifndef PYCOPY_EMIT_H
#define PYCOPY_EMIT_H

#include "frame.h"
#include "log.h"

#define PYCOPY_HEADERS_BYTES (14 + 40 + 60)
#define PYCOPY_WINDOW	     0xffff /* rewrite.WINDOW_FIELD */

#define PYCOPY_SUM_BYTES 512 /* bpf_csum_diff() takes no more before Linux 6.13 */

#define PYCOPY_SACK_PERM_TIMESTAMPS htonl(0x0402080a)
#define PYCOPY_NOP_NOP_SACK_PERM    htonl(0x01010402)

struct pycopy_work {
	__u64 now_ns; /* read once for each packet: the clock is a large part of what it costs */
	struct pycopy_reply reply;
	struct pycopy_flow flow;
	struct pycopy_key key;
	__u32 payload_bytes; /* of the held segment's frame that is to be sent */
	struct pycopy_log_record record;
	__u8 saved[PYCOPY_HEADERS_BYTES + 14];
	__u8 fresh[PYCOPY_HEADERS_BYTES + 14];
};

_Static_assert(sizeof(struct pycopy_work) <= PYCOPY_WORK_BYTES, "the map's values are too short");

static __always_inline struct pycopy_work *pycopy_work_of_cpu(void)
{
	u32 zero = 0;

	return pycopy_lookup(PYCOPY_MAP_WORK, &zero);
}

static __always_inline u32 pycopy_tsval(const struct pycopy_work *work,
					const struct pycopy_fast_config *config)
{
	return work->now_ns / 1000000 + config->timestamp_origin;
}

/* How much room pycopy_put_syn_options() needs. */
static __always_inline u32 pycopy_syn_options_bytes(u8 options)
{
	u32 bytes = options & PYCOPY_OPT_WSCALE ? 8 : 4;

	if (options & PYCOPY_OPT_TIMESTAMPS)
		return bytes + 12;
	return options & PYCOPY_OPT_SACK_PERM ? bytes + 4 : bytes;
}

/* rewrite.options_of() for a SYN, into what the client's own options took: non-zero
 * if that is too little.
 */
static __always_inline int pycopy_put_syn_options(u8 *to, u32 room,
						  const struct pycopy_reply *reply, u32 tsval)
{
	u8 *scale;

	__builtin_memset(to, PYCOPY_TCP_OPTION_NOP, 40);
	pycopy_put32(to, htonl(0x02040000 | reply->mss));
	if (reply->options & PYCOPY_OPT_TIMESTAMPS) {
		pycopy_put32(to + 4, reply->options & PYCOPY_OPT_SACK_PERM
					     ? PYCOPY_SACK_PERM_TIMESTAMPS
					     : PYCOPY_NOP_NOP_TIMESTAMPS);
		pycopy_put32(to + 8, htonl(tsval));
		pycopy_put32(to + 12, 0);
		scale = to + 16;
	} else if (reply->options & PYCOPY_OPT_SACK_PERM) {
		pycopy_put32(to + 4, PYCOPY_NOP_NOP_SACK_PERM);
		scale = to + 8;
	} else {
		scale = to + 4;
	}
	if (reply->options & PYCOPY_OPT_WSCALE) {
		pycopy_put32(scale, htonl(0x01030300 | reply->rcv_wscale));
		scale += 4;
	}
	return scale - to > room;
}

/* The TCP header's fixed part, without its checksum. */
static __always_inline void pycopy_put_tcp(u8 *tcp, const struct pycopy_key *key,
					   const struct pycopy_reply *reply, u32 tcp_header_bytes)
{
	u8 flags = reply->flags;

	__builtin_memcpy(tcp, key->client_port, 2);
	__builtin_memcpy(tcp + 2, key->server_port, 2);
	pycopy_put32(tcp + 4, htonl(reply->seq));
	pycopy_put32(tcp + 8, flags & PYCOPY_TCP_SYN ? 0 : htonl(reply->ack));
	if (!(flags & PYCOPY_TCP_SYN))
		flags |= PYCOPY_TCP_ACK;
	tcp[12] = tcp_header_bytes << 2;
	tcp[13] = flags;
	pycopy_put16(tcp + 14, htons(PYCOPY_WINDOW));
	pycopy_put16(tcp + 18, 0);
}

static __always_inline void pycopy_put_timestamps(u8 *to, const struct pycopy_reply *reply,
						  u32 tsval)
{
	pycopy_put32(to, PYCOPY_NOP_NOP_TIMESTAMPS);
	pycopy_put32(to + 4, htonl(tsval));
	pycopy_put32(to + 8, htonl(reply->ts_recent));
}

/* The copy's options, in the room that the client's took: non-zero if they need more. */
static __always_inline int pycopy_put_options(u8 *to, u32 room, const struct pycopy_reply *reply,
					      u32 tsval)
{
	if (reply->flags & PYCOPY_TCP_SYN)
		return pycopy_put_syn_options(to, room, reply, tsval);
	if (room == PYCOPY_TIMESTAMPS_BYTES) {
		if (reply->options & PYCOPY_OPT_TIMESTAMPS)
			pycopy_put_timestamps(to, reply, tsval);
		else
			__builtin_memset(to, PYCOPY_TCP_OPTION_NOP, PYCOPY_TIMESTAMPS_BYTES);
	}
	return 0;
}

/* A copy of the client's segment at hand leaves as `work->reply` says, under the
 * connection `key`; the packet is left as it was.  Zero, or why it could not be sent:
 * then the target has simply not got it.
 */
static __always_inline long pycopy_clone_as(PYCOPY_CTX *ctx, struct pycopy_work *work,
					    const struct pycopy_key *key,
					    const struct pycopy_hop *hop,
					    const struct pycopy_fast_config *config,
					    const u32 ip_bytes, u32 tcp_header_bytes, u32 tcp_bytes)
{
	const u32 ip_at = PYCOPY_L2_BYTES, tcp_at = PYCOPY_L2_BYTES + ip_bytes;
	const u32 addresses_at = ip_at + (ip_bytes == 20 ? 12 : 8);
	const u32 addresses_bytes = ip_bytes == 20 ? 8 : 32;
	u64 header_bytes = tcp_header_bytes;
	u8 *saved = work->saved, *fresh = work->fresh;
	u32 pseudo, rest;
	u16 vlan_tag = 0, vlan_protocol = 0, id;
	long failed;

	if (!pycopy_within(&header_bytes, 20, 60))
		return -1;
	if (bpf_skb_load_bytes(ctx, 0, saved, tcp_at + header_bytes))
		return -1;
	__builtin_memcpy(fresh, saved, PYCOPY_HEADERS_BYTES);
	__builtin_memcpy(&id, saved + ip_at + 4, 2);
	pycopy_put_ip(fresh, hop->l2, key->client_addr, key->server_addr, ip_bytes, PYCOPY_IP_TCP,
		      tcp_bytes, id);
	pycopy_put_tcp(fresh + tcp_at, key, &work->reply, header_bytes);
	if (pycopy_put_options(fresh + tcp_at + 20, header_bytes - 20, &work->reply,
			       pycopy_tsval(work, config)))
		return -1;
	pseudo = bpf_csum_diff((void *)saved + addresses_at, addresses_bytes,
			       (void *)fresh + addresses_at, addresses_bytes, 0);
	/* The checksum itself is the same in both, so far. */
	rest = bpf_csum_diff((void *)saved + tcp_at, header_bytes, (void *)fresh + tcp_at,
			     header_bytes, 0);
	if (bpf_skb_store_bytes(ctx, 0, fresh, tcp_at + header_bytes, 0))
		return -1;
	bpf_l4_csum_replace(ctx, tcp_at + 16, 0, pseudo, BPF_F_PSEUDO_HDR);
	bpf_l4_csum_replace(ctx, tcp_at + 16, 0, rest, 0);
	/* A tag says which network the packet came from, not where the copy goes. */
	if (ctx->vlan_present) {
		vlan_tag = ctx->vlan_tci;
		vlan_protocol = ctx->vlan_proto;
		bpf_skb_vlan_pop(ctx);
	}
	failed = bpf_clone_redirect(ctx, hop->ifindex, 0);
	if (vlan_protocol)
		bpf_skb_vlan_push(ctx, vlan_protocol, vlan_tag);
	/* Where the device summed up the packet, its sum knows of the pseudo-header. */
	bpf_l4_csum_replace(ctx, tcp_at + 16, 0, (u32)~pseudo, BPF_F_PSEUDO_HDR);
	bpf_skb_store_bytes(ctx, 0, saved, tcp_at + header_bytes, 0);
	return failed;
}

/* Sum of the frame's payload in the log, in memory order; there are zeros behind it.  By itself,
 * before the ways part by family and options: the verifier would go through the loop on each.
 */
static __always_inline u16 pycopy_sum_payload(struct pycopy_work *work, void *from)
{
	u64 payload = PYCOPY_FRESH(work->payload_bytes);
	u32 sum = 0;

#pragma clang loop unroll(disable)
	for (u64 done = 0; done < PYCOPY_RELEASE_BYTES; done += PYCOPY_SUM_BYTES) {
		u64 bytes = (payload - done + 3) & ~3ULL;

		if (done >= payload)
			break;
		PYCOPY_PIN(bytes);
		if (bytes > PYCOPY_SUM_BYTES)
			bytes = PYCOPY_SUM_BYTES;
		sum = bpf_csum_diff(0, 0, from + done, bytes, sum);
	}
	return pycopy_fold(sum);
}

/* The packet at hand becomes the segment `work->reply`, with the frame's payload out of
 * the log, at least one byte, whose sum is `payload_sum` (`from` is null: none).  Zero: it is
 * ready to be redirected.
 */
static __always_inline long pycopy_become(PYCOPY_CTX *ctx, struct pycopy_work *work,
					  const struct pycopy_key *key,
					  const struct pycopy_hop *hop,
					  const struct pycopy_fast_config *config,
					  const u32 ip_bytes, void *from, u16 payload_sum)
{
	const u32 tcp_at = PYCOPY_L2_BYTES + ip_bytes;
	const u32 addresses_at = PYCOPY_L2_BYTES + (ip_bytes == 20 ? 12 : 8);
	const u32 timestamps = work->reply.options & PYCOPY_OPT_TIMESTAMPS;
	u64 header_bytes = timestamps ? 32 : 20;
	u64 payload = from ? PYCOPY_FRESH(work->payload_bytes) : 0;
	u8 *fresh = work->fresh;
	u32 pseudo, total;

	if (ctx->vlan_present)
		bpf_skb_vlan_pop(ctx);
	__builtin_memset(fresh + tcp_at, 0, 32);
	pycopy_put_ip(fresh, hop->l2, key->client_addr, key->server_addr, ip_bytes, PYCOPY_IP_TCP,
		      header_bytes + payload, 0);
	pycopy_put_tcp(fresh + tcp_at, key, &work->reply, header_bytes);
	if (timestamps)
		pycopy_put_timestamps(fresh + tcp_at + 20, &work->reply,
				      pycopy_tsval(work, config));
	pseudo = pycopy_sum(fresh + addresses_at, ip_bytes == 20 ? 8 : 32,
			    htons(header_bytes + payload) + htons(PYCOPY_IP_TCP));
	pseudo = pycopy_fold(pseudo);
	total = timestamps ? pycopy_sum(fresh + tcp_at, 32, pseudo)
			   : pycopy_sum(fresh + tcp_at, 20, pseudo);
	/* Else clang asks `payload` instead, of which the verifier knows less. */
	PYCOPY_PIN(from);
	if (bpf_skb_change_tail(ctx, tcp_at + header_bytes + payload, 0))
		return -1;
	/* As if it were partial; then the rest, which is left out where it is. */
	pycopy_put16(fresh + tcp_at + 16, pseudo);
	if (bpf_skb_store_bytes(ctx, 0, fresh, tcp_at + header_bytes, 0))
		return -1;
	if (from && (!pycopy_within(&payload, 1, PYCOPY_RELEASE_BYTES) ||
		     bpf_skb_store_bytes(ctx, tcp_at + header_bytes, from, payload, 0)))
		return -1;
	return bpf_l4_csum_replace(ctx, tcp_at + 16, 0,
				   (u32)pycopy_fold((u64)pycopy_fold(total) + payload_sum + pseudo),
				   0);
}

#endif
