// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
/*
 * Takes in what intercepts on other hosts send straight to this one (relay.h): TC ingress
 * on the online host.  A datagram stands for a response of the target; a session that
 * the kernel keeps goes on with it, and the datagram itself becomes what is sent to the
 * target.  What is no such session's goes to user space.
 *
 * Whoever has the cookie is an intercept of this run.  Nothing else is touched, whatever
 * it pretends to be: TC sees it before any firewall of this host, which must have its say.
 */
#include "keep.h"
#include "record.h"

/* Value of the map "scratch" here. */
_Static_assert(sizeof(struct pycopy_datagram) <= PYCOPY_SCRATCH_BYTES,
	       "the map's values are too short");

struct pycopy_udp {
	__be16 src_port;
	__be16 dst_port;
	__be16 bytes;
	__u16 check;
};

/* The index of the intercept that the datagram says it comes from, or null. */
static __always_inline u32 *find_intercept(const __be32 *src, __be16 src_port)
{
	struct pycopy_endpoint endpoint = {};

	pycopy_set_endpoint(&endpoint, src, src_port);
	return pycopy_lookup(PYCOPY_MAP_INTERCEPTS, &endpoint);
}

/* Whether the packet is a whole UDP datagram with plain headers.  Its header is said to be
 * where TCP's would: that is what the packet may become.
 */
static __always_inline int find_udp(struct __sk_buff *ctx, struct pycopy_packet *packet)
{
	u32 at = PYCOPY_L2_BYTES;
	struct pycopy_ipv4 ip4;
	struct pycopy_ipv6 ip6;

	if (ctx->protocol == htons(PYCOPY_ETH_IPV4)) {
		if (pycopy_read(ctx, at, &ip4, sizeof(ip4)) || ip4.version_ihl != 0x45 ||
		    ip4.protocol != PYCOPY_IP_UDP || ip4.fragment & htons(0x3fff))
			return 0;
		packet->family = 4;
		packet->src[2] = htonl(0xffff);
		packet->src[3] = ip4.src;
		packet->tcp_at = at + sizeof(ip4);
		return 1;
	}
	if (ctx->protocol == htons(PYCOPY_ETH_IPV6)) {
		if (pycopy_read(ctx, at, &ip6, sizeof(ip6)) || ip6.next != PYCOPY_IP_UDP)
			return 0;
		packet->family = 6;
		__builtin_memcpy(packet->src, ip6.src, sizeof(ip6.src));
		packet->tcp_at = at + sizeof(ip6);
		return 1;
	}
	return 0;
}

/* A response of the target, from an intercept of ours. */
static __always_inline int take_in(struct __sk_buff *ctx, struct pycopy_packet *packet,
				   struct pycopy_segment *segment, u64 now_ns)
{
	u32 ifindex = 0;
	int kept;

	/* What user space relies on; an intercept of ours says nothing else. */
	if (segment->kind != PYCOPY_TARGET || segment->sack_blocks > 4 || segment->payload_bytes) {
		pycopy_count(PYCOPY_INT_MALFORMED, 1);
		return TC_ACT_SHOT;
	}
	kept = pycopy_keep_target(ctx, packet, segment, now_ns, &ifindex);
	if (kept == PYCOPY_KEPT || kept == PYCOPY_GONE_OUT) {
		pycopy_count(PYCOPY_INT_KEPT, 1);
		return kept == PYCOPY_KEPT ? TC_ACT_SHOT : bpf_redirect(ifindex, 0);
	}
	pycopy_record_response(ctx, segment, PYCOPY_INT_CAPTURED);
	return TC_ACT_SHOT;
}

int pycopy_progress(struct __sk_buff *ctx)
{
	struct pycopy_settings *settings = pycopy_settings();
	struct pycopy_packet packet = {};
	struct pycopy_datagram *datagram;
	struct pycopy_udp udp;
	u32 zero = 0, *number;
	u64 now_ns, *known;

	if (!settings || !find_udp(ctx, &packet) ||
	    pycopy_read(ctx, packet.tcp_at, &udp, sizeof(udp)) ||
	    udp.dst_port != htons(settings->datagram_port))
		return TC_ACT_UNSPEC;
	number = find_intercept(packet.src, udp.src_port);
	datagram = pycopy_lookup(PYCOPY_MAP_SCRATCH, &zero);
	known = pycopy_lookup(PYCOPY_MAP_COOKIE, &zero);
	if (!number || !datagram || !known)
		return TC_ACT_UNSPEC;
	now_ns = pycopy_now();
	if (udp.bytes != htons(sizeof(udp) + sizeof(*datagram)) ||
	    bpf_skb_load_bytes(ctx, packet.tcp_at + sizeof(udp), datagram, sizeof(*datagram)) ||
	    datagram->cookie != *known) {
		pycopy_count(PYCOPY_INT_MATCHED, 1);
		pycopy_count(PYCOPY_INT_PASSED, 1);
		return TC_ACT_UNSPEC;
	}
	if (datagram->kind == PYCOPY_PROBE) {
		now_ns = bpf_ktime_get_ns();
		pycopy_update(PYCOPY_MAP_PROBES, number, &now_ns, 0);
		return TC_ACT_SHOT;
	}
	pycopy_count(PYCOPY_INT_MATCHED, 1);
	if (pycopy_has_lapsed(now_ns, PYCOPY_GRACE_NS)) {
		pycopy_count(PYCOPY_INT_LAPSED, 1);
		return TC_ACT_UNSPEC;
	}
	if (datagram->kind != PYCOPY_RELAYED_SEGMENT) {
		pycopy_count(PYCOPY_INT_MALFORMED, 1);
		return TC_ACT_SHOT;
	}
	return take_in(ctx, &packet, &datagram->segment, now_ns);
}
